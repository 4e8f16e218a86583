"""HTTP in front of policies: protocols, batching, sessions and reload. Needs the extra `serve`."""
