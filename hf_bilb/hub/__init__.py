"""The Hugging Face Hub: the model card, what goes into a repository, and the push itself."""
