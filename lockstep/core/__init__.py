"""Data and errors that every room speaks. Imports nothing else of Lockstep."""
