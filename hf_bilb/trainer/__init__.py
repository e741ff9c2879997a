"""`BilevelMTLTrainer` and its arguments: everything that is done while a model trains."""
