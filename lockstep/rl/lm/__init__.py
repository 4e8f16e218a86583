"""Reinforcement learning of language models: one readable loop each, on shared rollouts, losses and publication."""
