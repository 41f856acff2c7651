"""What a student is worth: functions over features, and the report that runs them all."""
