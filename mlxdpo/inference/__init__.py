"""What a trained run answers and scores."""
