"""Requests in, tokens and log-probabilities out: one scheduler, one paged cache, one radix tree, one sampler.

A public call descends `LLM.generate` -> `Engine.step` -> `Scheduler.plan_step` -> `Runner.run` -> model -> kernel.
"""
