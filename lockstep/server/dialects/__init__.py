"""HTTP dialects: thin translations between a protocol and `lockstep.server.generation`. Nothing is decided here."""
