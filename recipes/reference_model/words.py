"""The words and sentences that the generated problems are told in."""

# fmt: off
NAMES = (
    "Ada", "Amir", "Anya", "Bela", "Bruno", "Chidi", "Clara", "Dara", "Diego", "Elif", "Emma", "Farid", "Fiona",
    "Gita", "Goran", "Hana", "Hugo", "Ines", "Ivan", "Jaya", "Jonas", "Kai", "Karin", "Leo", "Lina", "Malik", "Mara",
    "Nadia", "Nils", "Olga", "Omar", "Petra", "Priya", "Ravi", "Rosa", "Samir", "Sofia", "Tara", "Tomas", "Uma",
    "Vera", "Wen", "Yara", "Zane"
)
OBJECTS = (
    "apples", "beads", "bolts", "books", "bricks", "buttons", "candles", "cards", "chairs", "coins", "cups", "eggs",
    "envelopes", "flowers", "jars", "keys", "lamps", "lemons", "letters", "magnets", "marbles", "nails", "nuts",
    "pages", "pears", "pencils", "photos", "plates", "plums", "ribbons", "screws", "seeds", "shells", "spoons",
    "stamps", "stickers", "stones", "tickets", "tiles", "toys"
)
PLACES = (
    "market", "library", "garden", "school", "workshop", "museum", "harbour", "station", "bakery", "farm"
)
BOXES = (
    "boxes", "bags", "crates", "baskets", "shelves", "trays", "drawers", "bins"
)
TIMES = (
    "In the morning", "At noon", "In the evening", "Later", "The next day", "On Friday", "After that", "Then"
)
# fmt: on

# First sentences state the quantity and, for a first step, often the operation with it.
STARTS = (
    "{name} has {a} {obj}.",
    "There are {a} {obj} at the {place}.",
    "{name} counts {a} {obj} at the {place}.",
    "{name} brings {a} {obj} to the {place}.",
    "A box of {name} holds {a} {obj}.",
)
STEPS = {
    "add": (
        "{time}, {b} more {obj} are added.",
        "{time}, {name} buys another {b} {obj}.",
        "A friend of {name} gives {b} more {obj}.",
        "{time}, {b} {obj} arrive from the {place}.",
        "{name} finds {b} other {obj} and keeps them.",
    ),
    "sub": (
        "{time}, {b} of the {obj} are sold.",
        "{time}, {name} gives away {b} {obj}.",
        "{name} loses {b} of them.",
        "{time}, {b} {obj} are taken to the {place}.",
        "It turns out that {b} of the {obj} are broken and thrown out.",
    ),
    "mul": (
        "{time}, the number of {obj} grows to {b} times as many.",
        "{name} then makes it {b} times as many.",
        "There are {b} such {box} with that many {obj} in each, and all are counted.",
        "{time}, {name} collects {b} times that number of {obj}.",
    ),
    "div": (
        "{time}, they are split equally into {b} {box} and only one is kept.",
        "{name} shares them equally among {b} friends and looks at one share.",
        "{time}, {name} packs the {obj} into {b} equal {box} and takes one.",
        "They are put into {b} equal groups, and one group stays.",
    ),
}
QUESTIONS = (
    "How many {obj} are there in the end?",
    "How many {obj} does that make?",
    "How many {obj} are there now?",
    "What is the number of {obj} at the end?",
)
