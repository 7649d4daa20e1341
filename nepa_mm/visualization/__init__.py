"""What a network does with an image, and how it is drawn."""
