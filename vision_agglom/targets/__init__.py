"""What the student is trained towards: teachers' features, normalised by statistics that all ranks share."""
