"""What is wrong with data, found before it is trained on."""
