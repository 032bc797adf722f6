"""Krylov spaces of F: blocks of rows kept orthonormal, the Lanczos factorization, and what it says of what it lacks."""
