"""Kernel generators: each file is one kernel family, from a specification and knobs to a TIR function."""
