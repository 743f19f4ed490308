"""One worker per engine, each run in the environment that the file beside it with the same name pins."""
