"""The demo's words: what is printed on its pages, drawn on its scenes, asked and answered."""

NAMES = (
    "total", "tax", "balance", "account", "invoice", "order", "customer", "phone", "postcode", "room", "table",
    "weight", "height", "width", "depth", "volume", "pressure", "speed", "discount", "deposit", "payment", "receipt",
    "ticket", "flight", "gate", "seat", "train", "platform", "budget", "salary", "bonus", "rent", "energy", "water",
    "gas", "mileage", "permit", "licence", "policy", "claim", "member", "badge", "locker", "code", "serial", "voucher",
    "refund", "credit",
)  # fmt: skip
"""Names of a document's fields: at most eight letters, two patches."""

ITEMS = (
    "pen", "cup", "book", "lamp", "chair", "apple", "bread", "milk", "tea", "coffee", "soup", "rice", "salt", "sugar",
    "honey", "soap", "towel", "brush", "candle", "basket", "bottle", "ruler", "stamp", "notebook",
)  # fmt: skip
"""Articles of a price list."""

COLOURS = {
    "red": (208, 40, 44),
    "blue": (36, 84, 212),
    "green": (34, 150, 62),
    "yellow": (240, 208, 32),
    "purple": (140, 52, 176),
    "orange": (244, 132, 24),
}

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")

FILLERS = (
    "PAGE", "NOTE", "FORM", "COPY", "SEE", "VIA", "DEPT", "MAIN", "SIGNED", "OFFICE", "STREET", "REMARKS", "APPROVED",
    "CHECKED", "ISSUED", "GENERAL", "REPORT", "SUMMARY", "N/A", "A-12", "B/7", "NO. 5", "REF 31", "UNIT 2", "& CO",
)  # fmt: skip
"""Printed between the fields; never asked for."""

TITLES = ("STATEMENT", "DELIVERY", "REGISTER", "CONTRACT", "SCHEDULE", "INSPECTION", "RECORD", "CERTIFICATE")

DOCUMENT_QUESTIONS = (
    "What is the {0} on this page? Answer with the name and the digits only.",
    "Read the value of {0} on this page and answer with the name and the number.",
    "Please tell me the {0} printed in this document.",
    "Which number is written next to {0} in the image?",
    "Find {0} on the page and give me its value.",
    "What does the document say for {0}? Reply with the name and the number only.",
    "What is the {0}?",
    "What is the value of {0} shown in the image?",
    "I need the {0} from this form, please read it for me.",
    "Look up {0} in this document and write down the four digits.",
)

PLACE_QUESTIONS = (
    "Where is {0} on the page?",
    "Where is the {0} on this page? Answer with the name and two numbers.",
    "Please tell me where the {0} is printed in this document.",
    "Where do you see {0} in the image?",
    "Find {0} on the page and tell me where it is.",
    "Where in the document is the value of {0} written?",
    "Look up where {0} is on this page and write down two numbers.",
    "Where is the {0}?",
)

PRICE_QUESTIONS = (
    "What is {0} plus {1}?",
    "How much do {0} and {1} cost together? Show the working.",
    "Add the prices of {0} and {1} in this list and show the working.",
    "What is the sum of {0} and {1}? Please write the working.",
    "I buy {0} and {1}, how much do I pay? Show the working.",
    "Find {0} and {1} on the price list, then add the two numbers.",
)

SCENE_QUESTIONS = (
    "Describe the scene.",
    "List the shapes in the image in reading order.",
    "What do you see in this image? List every shape with its colour.",
    "Which coloured shapes are in the picture? List all of them from top to bottom.",
    "Please describe this picture, name the colour and the shape of everything in it.",
    "Write a caption for this image that names every coloured shape in reading order.",
)

COUNT_QUESTIONS = (
    "How many {0}, {1} and {2} are there?",
    "Count the {0}, {1} and {2} in this image and answer with three numbers.",
    "Please tell me how many {0}, {1} and {2} you see in the picture.",
)


def plural(shape: str) -> str:
    """The plural of one of `SHAPES`."""
    return shape + ("es" if shape.endswith("s") else "s")
