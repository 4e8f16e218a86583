"""Llama 2 and 3, and what is Llama in all but name: Mistral, Yi, Aquila, InternLM."""
