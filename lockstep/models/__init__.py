"""Model definitions, each written once and used by training, sampling, serving and export alike."""
