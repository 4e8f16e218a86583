"""Lockstep: one stack that trains reinforcement-learning models and serves them."""
