"""The parts of the experiment: what each trains, measures, draws and tabulates."""
