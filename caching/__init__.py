"""What is learned of requests, to skip work: caches behind layers that answer them, and the key of memo files."""
