"""What GradientNoiseScale is made of: parts, samples, measurements and their history."""
