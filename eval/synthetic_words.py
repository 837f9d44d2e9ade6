"""The words of the synthetic suite: neutral filler, and what facts and questions are made of.

All of them are Fathom's own. Filler holds no digit, no name and none of the things that facts are
about, so that nothing in it can be taken for an answer.
"""

# ---- filler -----------------------------------------------------------------------------------

# Each slot in braces is filled from the list of that name.
FILLER = (
    "The {material} {object} in the {room} had been {treated} {when}.",
    "{People} {did} {where}, as they did every {season}.",
    "Nobody minded that the {weather} lasted until {hour}.",
    "There was talk of {topic} once more, but nothing was settled.",
    "A {mood} smell of {smell} came from the {room}.",
    "{People} spoke slowly about {topic} while the {weather} passed.",
    "By {hour} the {place} was quiet again.",
    "Someone had left a {material} {object} beside the stairs.",
    "It was the kind of {season} in which {people} {did} {where}.",
    "The road to the {place} was {mood} after the {weather}.",
    "If the {weather} held, {people} would walk as far as the {place} before {hour}.",
    "What mattered more was {topic}, which {people} had put off {when}.",
    "From the {room} one could see the {place}, {mood} and still.",
    "The {object} was {treated} {when}, and the rest was not.",
    "Later {people} {did}, and the talk turned to {topic}.",
    "In the {room} stood a {mood} {object} that had once been {treated}.",
)
SLOTS = {
    "material": "wooden woollen copper wicker leather linen tin clay paper velvet".split(),
    "object": (
        "table lamp basket curtain kettle ladder mirror bench blanket drawer broom bucket chair"
        " cupboard carpet jug stove shelf cushion tray"
    ).split(),
    "room": ("kitchen hallway attic cellar pantry parlour washroom porch workshop stable".split()),
    "treated": "repaired painted moved washed forgotten covered polished mended".split(),
    "when": (
        "long ago",
        "before the holidays",
        "in the spring",
        "more than once",
        "without much care",
        "after the move",
        "some weeks earlier",
        "for no clear reason",
    ),
    "people": (
        "the neighbours",
        "the cousins",
        "the guests",
        "the older children",
        "a few travellers",
        "the cooks",
        "the sisters",
        "some visitors",
    ),
    "did": (
        "sat together",
        "drank tea",
        "sorted the laundry",
        "waited for news",
        "played cards",
        "peeled apples",
        "wrote letters",
        "watched the clouds",
        "sang old songs",
    ),
    "where": (
        "by the window",
        "under the trees",
        "near the well",
        "along the wall",
        "behind the house",
        "on the steps",
        "at the long table",
    ),
    "weather": "rain wind frost heat fog thaw drizzle snow".split(),
    "hour": ("noon", "evening", "dusk", "breakfast", "midnight", "supper", "dawn"),
    "season": "spring summer autumn winter".split(),
    "topic": (
        "the price of flour",
        "the new fence",
        "a wedding",
        "the harvest",
        "the leaking roof",
        "an old quarrel",
        "the coming fair",
        "the state of the road",
        "a lost umbrella",
        "the taste of the soup",
        "the colour of the shutters",
    ),
    "smell": "smoke bread soap hay coffee varnish rain apples".split(),
    "mood": "grey soft heavy plain damp narrow pale dusty gentle dull".split(),
    "place": "village meadow orchard mill bridge market chapel pond crossroads hill".split(),
}

# ---- facts ------------------------------------------------------------------------------------

# No two begin with the same two letters where it could be helped: the first token tells them apart.
NAMES = (
    "Adaora Bertil Cosima Dragan Eluned Farouk Gudrun Hideo Ignacy Jorunn Kwame Lorcan Milena"
    " Nasrin Orsolya Piotr Quentin Rosalba Sigrun Tariq Ulrike Viktor Wanjiru Xiomara Yasmin"
    " Zoltan Anselm Britta Ciaran Dorota Emre Frieda Gustavo Henrike Imani Jasper Katalin Leandro"
    " Mireille Nikolai Ottilie Pradeep Ragnar Soledad Tomasz Umberto Veronika Wilhelm Yuki Zainab"
).split()

# What a literal fact is about: an attribute and a thing; each is used once in a haystack.
ATTRIBUTES = (
    "access code",
    "serial number",
    "freight number",
    "licence number",
    "catalogue number",
    "order number",
    "batch number",
    "customs number",
    "insurance number",
    "inventory number",
)
THINGS = (
    "lighthouse telescope locomotive submarine glider harpsichord observatory windmill icebreaker"
    " tractor printing-press seismograph greenhouse crane tanker helicopter turbine archive"
    " planetarium vineyard"
).split()
ADJECTIVES = "northern southern eastern western upper lower first second Danish Polish".split()
SHEDS = "Kestrel Juniper Basalt Meridian Walrus Saffron Tundra Obsidian Cobalt Falcon".split()
BIRDS = "heron cormorant kingfisher bittern pelican stork".split()

# A fact and a question that share no word of meaning; {name} is the answer.
NON_LITERAL = (
    ("{name} spends every morning feeding the lions and the elephants.", "Who works at a zoo?"),
    ("{name} never sets out without a stethoscope.", "Who is a doctor?"),
    ("{name} grew up in the shadow of the Eiffel Tower.", "Who comes from Paris?"),
    ("{name} puts neither milk nor eggs nor meat on a plate.", "Who is a vegan?"),
    ("{name} tunes the violin before each concert.", "Who is a musician?"),
    ("{name} sees the pyramids from the balcony at home.", "Who lives in Egypt?"),
    ("{name} carries the hose up the ladder when the siren sounds.", "Who is a firefighter?"),
    ("{name} stamps the borrowed novels and puts them back.", "Who is a librarian?"),
    ("{name} kneads the dough hours before sunrise.", "Who is a baker?"),
    ("{name} sets the broken legs of cats and dogs.", "Who is a vet?"),
    ("{name} has climbed to the top of Mount Fuji twice.", "Who has been to Japan?"),
    ("{name} cannot hear a word, and reads lips.", "Who is deaf?"),
    ("{name} hauls in the nets when the tide turns.", "Who is a fisherman?"),
    ("{name} takes the measure for suits and shortens trousers.", "Who is a tailor?"),
    ("{name} leads the town council and wears its golden chain.", "Who is the mayor?"),
    ("{name} landed the jet in spite of one dead engine.", "Who is a pilot?"),
    ("{name} crosses the Golden Gate on the way to work.", "Who lives near San Francisco?"),
    ("{name} writes equations on the blackboard for a class of thirty.", "Who teaches maths?"),
    ("{name} argued for the accused before the judge.", "Who is a lawyer?"),
    ("{name} pulled the aching molar within a minute.", "Who is a dentist?"),
    ("{name} rode a gondola past the palace of the Doge.", "Who visited Venice?"),
    ("{name} swaps fuses and pulls new cables.", "Who is an electrician?"),
    ("{name} shears the flock at the start of June.", "Who keeps sheep?"),
    ("{name} blew out all the candles on the cake.", "Who had a birthday?"),
    ("{name} is woken by kangaroos in the garden.", "Who lives in Australia?"),
    ("{name} strikes the red-hot iron on the anvil.", "Who is a blacksmith?"),
    ("{name} collects honey from forty hives.", "Who keeps bees?"),
    ("{name} drew every wall and stair of the new town hall.", "Who is an architect?"),
    ("{name} trims beards and sweeps up the hair.", "Who is a barber?"),
    ("{name} waters the roses and mows the lawns of the park.", "Who is a gardener?"),
)
