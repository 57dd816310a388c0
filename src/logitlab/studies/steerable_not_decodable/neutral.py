"""Texts that have nothing to do with any of the tasks."""

TEXTS = (
    "The river came down from the hills after the rain, brown and quick, and carried branches under the old stone "
    "bridge. Two men stood at the railing and talked about the price of hay while their horses waited.",
    "To make the dough, mix flour and water in a large bowl and let it rest for half an hour. Then fold it a few "
    "times, cover it with a cloth, and leave it in a warm place until it has doubled in size.",
    "The committee will meet again on Thursday to discuss the budget for next year. Members who cannot attend are "
    "asked to send their comments to the office before the end of the week.",
    "Light from the star takes about four years to reach us. What we see tonight left it when the telescope was "
    "still being built, and what it sends out now will arrive after the next mission has ended.",
    "She put the letter back into the drawer and looked out of the window for a long time. The children were "
    "playing in the yard, and nobody had told them yet that the house would be sold.",
    "The function reads the file line by line and keeps a running total. If a line cannot be parsed, it is "
    "written to the log together with its number, and the program goes on with the next one.",
)
