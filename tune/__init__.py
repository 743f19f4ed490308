"""Tuning: TVM's MetaSchedule searches the knobs of every kernel of a model; records keep what was found."""
