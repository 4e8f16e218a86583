"""Learning: collect -> score -> advantage -> learn -> publish."""
