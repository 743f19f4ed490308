"""Loads and runs compiled modules with numpy, tvm_ffi, tokenizers and libtvm_runtime alone."""
