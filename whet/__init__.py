"""Whet compiles a distilled transformer encoder into one loadable ``.so`` that runs on a CPU as block-sparse int8."""
