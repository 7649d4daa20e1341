"""Support for the current and the original OpenMMLab distributions."""
