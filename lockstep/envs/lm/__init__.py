"""Verifiable tasks for language models: problems, verifiers in killable processes, episodes of several turns."""
