"""Parts of `lockstep bench engine`: model files, a process for each library, and what they are asked to do."""
