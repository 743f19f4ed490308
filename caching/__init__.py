"""Caches of what a network computed: behind its layers they answer requests that they recognise."""
