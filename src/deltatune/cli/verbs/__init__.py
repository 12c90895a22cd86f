"""The verbs and their options, a file a group. Each hands over to a file of `cli`, imported when it is called."""
