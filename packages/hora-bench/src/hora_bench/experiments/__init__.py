"""The paper's experiments, one module each: a function that returns a result, and a command that runs it."""
