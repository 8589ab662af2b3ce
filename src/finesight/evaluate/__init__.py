"""Answers scored task by task, with intervals, before against after."""
