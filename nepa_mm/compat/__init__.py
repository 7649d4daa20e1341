"""Which OpenMMLab stack is installed, and what the original distributions need."""
