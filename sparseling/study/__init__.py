"""Study of a trained model: tasks with worked solutions, evaluation."""
