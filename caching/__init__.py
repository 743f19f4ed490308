"""Caches of what a network computed: learned ones after its layers answer requests that they recognise."""
