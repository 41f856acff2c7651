"""What can be trained: each task brings a model, its data and a forward step to the one trainer."""
