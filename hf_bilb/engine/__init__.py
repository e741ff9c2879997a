"""What all methods share: from K losses to coefficients, own parameters and state. Imports torch alone."""
