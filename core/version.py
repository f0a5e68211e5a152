"""The service's version, stated once for code; pyproject.toml repeats it and a test compares."""

VERSION = "0.1.0"
PROTOCOL = 3
"""In which shape this code writes a job's input, and up to which it can read one. Raised by one in the change that gives an input a
shape that older workers would misread; they then finish what they have and leave the new jobs to newer workers."""
LABELS = 1
"""Which bytes labeling makes. Raised by one in the change after which the same images, network and config give other ones: labels
that were made before are then not taken over any more."""
