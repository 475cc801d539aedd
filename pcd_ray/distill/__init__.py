"""The method in pure torch: teacher, student, loss."""
