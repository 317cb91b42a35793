"""The words and sentences of which generated OCR prompts are made: pure data, for `tasks.ocr`.

`{name}` stands for one of `WORDS[name]`, `{text}` for the quoted target, `{1-99}` for a number of that range.
"""

from collections.abc import Mapping, Sequence


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(each.split()) for each in text.split(","))


def _scenes(text: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Lines of kinds of targets that fit into a scene, then the scene."""
    lines = [line.partition(": ") for line in text.strip().splitlines()]
    return tuple((tuple(kinds.split()), scene) for kinds, _, scene in lines)


TARGETS: Mapping[str, Sequence[str]] = {
    "notice": (
        "Do Not {act}", "No {activity}", "Caution {hazard}", "Beware of {danger}", "Keep {state}",
        "Please {ask}", "{who} Only", "Danger {hazard}", "{hazard} Ahead", "Speed Limit {10-90}",
        "Maximum {2-40} Persons", "{ask} Please", "Watch Out for {danger}", "{act} at Your Own Risk",
        "{activity} Prohibited", "Stop! {hazard}", "No {activity} No {activity}", "Please {ask} Thank You",
        "{hazard} Keep {state}",
    ),
    "way": (
        "{town} {2-99} Miles", "Next Stop {street} Street", "{street} Street", "To the {adjective} {noun}",
        "Exit {1-60} {town}", "Last Gas for {10-90} Miles", "{noun} Trail {1-12}", "Welcome to {town}",
        "Turn {side} at the {noun}", "{town} Ferry Terminal", "Platform {1-24} to {town}",
        "{noun} Bridge Closed", "Lost at {street} Street", "{town} Station Platform {1-24}",
        "Scenic Route to {town}",
    ),
    "shop": (
        "{adjective} {noun} {shop}", "The {adjective} {noun}", "{noun} and {noun}", "{name}'s {shop}",
        "{street} Street {shop}", "{noun} {shop}", "{town} {shop}", "{name} and {name} {shop}",
        "{adjective} {shop}", "Old {town} {shop}", "The {adjective} {noun} {shop}",
        "{name} and {name} {shop} {town}", "The {noun} and {noun} {shop}",
    ),
    "offer": (
        "Fresh {food} ${2-19}", "{10-80}% Off {goods}", "Buy {2-5} Get 1 Free", "Free {food} Today",
        "Sale Ends {weekday}", "{goods} Half Price", "Hot {food} Here", "{2-12} {food} for ${2-30}",
        "Today Only {food}", "{weekday} is {food} Day", "{goods} from ${5-95}", "Try Our New {food}",
        "Buy {2-5} {food} Get 1 Free", "{weekday} Special Hot {food}", "{goods} and {goods} on Sale",
    ),
    "code": (
        "Gate {letter}{1-60}", "Room {100-999}", "Flight {100-999}", "Platform {1-24}", "Sector {2-99}",
        "{letter}{letter}{letter} {100-999}", "Unit {1-40}{letter}", "Locker {10-999}", "{10-23}:{10-59}",
        "Sample {letter}{letter}{10-99}", "Seat {1-40}{letter}", "{2-99}", "{letter} {letter}",
        "Hangar {2-40}", "Flight {100-999} {flown}", "Bus {2-99} {town}", "Table {1-60} {name}",
        "Taxi {1000-9999}", "Flight {100-999} to {town}", "Train {10-99} to {town} {flown}",
        "Property of {name} Room {10-99}",
    ),
    "date": (
        "{month} {1-28} {1850-2060}", "Est {1850-2020}", "Since {1850-2020}", "{season} Fair {1950-2060}",
        "Class of {1950-2060}", "{weekday} at {1-11} PM", "Opening {month} {1-28}",
        "{town} Marathon {1990-2060}", "Founded in {1700-1990}", "Vote on {month} {1-28}",
        "{season} Concert {month} {1-28}", "Closed on {weekday}s", "{town} {season} Fair {1990-2060}",
        "Opening {weekday} {month} {1-28}",
    ),
    "motto": (
        "{verb} {manner}", "Follow the {adjective} {noun}", "{virtue} and {virtue}", "{virtue} Never Sleeps",
        "Chase the {noun}", "{verb} More {verb} Less", "Life is a {noun}", "{verb} {verb} {verb}",
        "Be a {noun}", "{verb} Before You {verb}", "Powered by {food}", "{virtue} Is {virtue}",
        "Save the {noun}", "I Believe in {food}", "Who Ate My {food}?", "{verb} {manner} {verb} {manner}",
        "{virtue} Begins with {virtue}",
    ),
    "title": (
        "The {adjective} {noun}", "The {noun} of {town}", "Return to {noun} Hill",
        "Beyond the {adjective} {noun}", "{name} and the {noun}", "Secrets of the {noun}", "The Last {noun}",
        "How to Draw a {noun}", "{noun} Rising", "A Short History of {food}", "{adjective} {noun} Tour",
        "My Year in {town}", "Escape from {town}", "Introduction to {food}", "Songs for a {noun}",
        "The {adjective} {noun} of {town}", "The {noun} Who Came to {town}",
        "The {noun} and the {adjective} {noun}",
    ),
    "message": (
        "{device} {status}", "Error {100-999}", "Loading {2-99} Percent", "{2-99} New Messages",
        "{device} {status} {status}", "Level {2-60} Complete", "{1000-19000} Steps Today",
        "Player {1-4} Wins", "Docking in {2-59} Minutes", "Calling {name}", "{name} is Typing",
        "{device} Check {1-12}", "Storm Warning Level {1-5}", "Unknown {noun} Found",
        "{device} {status} Call {name}", "{device} {status} Please Restart",
        "{device} {status} {device} {status}",
    ),
    "label": (
        "{adjective} {food}", "{food} and {food}", "Organic {food}", "{name}'s {food}",
        "Extra {adjective} {food}", "{noun} Brand {food}", "Product of {town}", "{food} No {1-99}",
        "Shake Well", "Homemade {food}", "Grandma's {food}", "{adjective} {noun} {food}",
        "{town} {adjective} {food}", "{adjective} {food} and {food}", "{name}'s {adjective} {food}",
    ),
    "greeting": (
        "Happy Birthday {name}", "Welcome Home {name}", "Good Luck {name}", "Get Well Soon {name}",
        "{name} and {name}", "Congratulations {name}", "Thank You {name}", "Go {noun}s Go",
        "Goodbye {season}", "Greetings from {town}", "Happy {4-19}th {name}", "{name} Was Here",
        "We Miss You {name}", "{name} Loves {food}", "Team {name}", "Welcome Home {name}!",
        "Happy Birthday Dear {name}", "Greetings from {adjective} {town}",
        "Congratulations {name} and {name}",
    ),
    "word": (
        "{noun}", "{virtue}", "{adjective}", "{verb}", "{food}", "{town}",
    ),
}  # fmt: skip
"""What is written, by kind."""

WORDS: Mapping[str, Sequence[str]] = {
    "adjective": _list("""
        Amber, Ancient, Blazing, Bold, Brave, Bright, Broken, Calm, Clever, Cobalt, Cosmic, Crimson, Crystal,
        Curious, Daring, Distant, Dusty, Electric, Emerald, Endless, Faded, Fearless, Floating, Forgotten,
        Frozen, Gentle, Gilded, Glowing, Golden, Happy, Hidden, Hollow, Humble, Icy, Indigo, Iron, Ivory,
        Jolly, Lazy, Little, Lively, Lonely, Lucky, Lunar, Mellow, Merry, Midnight, Mighty, Misty, Modern,
        Mystic, Noble, Northern, Polar, Proud, Quiet, Radiant, Rapid, Restless, Royal, Rustic, Salty, Scarlet,
        Secret, Shining, Silent, Silver, Sleepy, Smoky, Snowy, Solar, Spicy, Stormy, Sunny, Sweet, Thirsty,
        Tiny, Tropical, Twilight, Urban, Velvet, Violet, Wandering, Wild, Winding, Wooden
    """),
    "noun": _list("""
        Acorn, Anchor, Arrow, Aurora, Badger, Beacon, Bear, Bridge, Canyon, Castle, Cedar, Comet, Compass,
        Coral, Crane, Crow, Dragon, Drum, Eagle, Ember, Falcon, Feather, Fern, Forest, Fountain, Fox, Galaxy,
        Garden, Glacier, Harbor, Hare, Hawk, Heron, Horizon, Island, Jungle, Kettle, Kite, Lagoon, Lantern,
        Lemon, Leopard, Lion, Lotus, Maple, Meadow, Mirror, Moon, Moose, Mountain, Nebula, Needle, Nest, Oak,
        Ocean, Orchard, Otter, Owl, Palace, Panda, Parrot, Pearl, Penguin, Phoenix, Pine, Planet, Pumpkin,
        Quill, Rabbit, Raven, Reef, River, Robin, Rocket, Rose, Sail, Salmon, Shadow, Shell, Sparrow, Spruce,
        Star, Summit, Sunset, Swan, Temple, Thistle, Thunder, Tiger, Tower, Turtle, Valley, Voyage, Walrus,
        Whale, Willow, Wolf
    """),
    "shop": _list("""
        Bakery, Barbers, Bistro, Books, Brewery, Cafe, Cinema, Clinic, Coffee, Deli, Diner, Florist, Gallery,
        Garage, Grill, Grocer, Guitars, Hardware, Hotel, Inn, Jewelers, Laundry, Market, Motors, Museum,
        Noodles, Optics, Pharmacy, Pizza, Pottery, Records, Salon, Shoes, Studio, Sushi, Tavern, Tea House,
        Theater, Toys, Travel
    """),
    "name": _list("""
        Ada, Alice, Amir, Anna, Ben, Bruno, Carla, Chloe, Clara, Dan, Dora, Elena, Eli, Emma, Felix, Fiona,
        Grace, Hana, Hugo, Iris, Ivan, Jack, Jonas, Julia, Kai, Kim, Lara, Leo, Lily, Luca, Maya, Max, Mia,
        Mila, Nora, Noah, Oscar, Omar, Paul, Pia, Priya, Rosa, Ruby, Sam, Sofia, Tariq, Theo, Tom, Uma, Vera,
        Victor, Yuki, Zoe
    """),
    "town": _list("""
        Ashford, Bayview, Brookside, Cedarville, Clifton, Dunmore, Eastport, Fairhaven, Glenwood, Greenfield,
        Harborough, Hillcrest, Kingsbridge, Lakewood, Marlow, Millbrook, Newhaven, Northgate, Oakdale,
        Pinewood, Redcliff, Riverton, Rosewood, Seaside, Silverton, Springfield, Stonebridge, Sunnyvale,
        Waterford, Westbrook, Whitby, Winterton
    """),
    "street": _list("""
        Baker, Canal, Castle, Cedar, Chapel, Elm, Forest, Garden, Harbor, High, King, Lake, Lincoln, Maple,
        Market, Mill, Oak, Orchard, Park, Pearl, Pine, Queen, River, School, Station, Temple, Tower, Union,
        Walnut, Water
    """),
    "food": _list("""
        Almonds, Apples, Bagels, Biscuits, Bread, Butter, Caramel, Cheddar, Cherries, Chili, Cider, Cocoa,
        Coffee, Cookies, Curry, Donuts, Ginger, Honey, Jam, Lemonade, Mangoes, Marmalade, Mint, Muffins,
        Mustard, Noodles, Olives, Pancakes, Pasta, Peaches, Peanuts, Pears, Pickles, Plums, Popcorn, Pretzels,
        Rice, Salsa, Soup, Tacos, Tea, Tofu, Tomatoes, Vanilla, Waffles
    """),
    "goods": _list("""
        Bicycles, Blankets, Boots, Candles, Carpets, Clocks, Coats, Cushions, Flowers, Games, Guitars, Hats,
        Helmets, Jackets, Kettles, Lamps, Mirrors, Paints, Plants, Posters, Records, Scarves, Shoes, Skates,
        Sofas, Tents, Tires, Toys, Umbrellas, Watches
    """),
    "act": _list("""
        Climb, Cross the Line, Disturb, Drink, Enter, Feed the Birds, Knock, Lean on Glass, Leave Bags, Open,
        Park Here, Push, Run, Sit Here, Stack, Swim, Touch, Wake the Cat, Block the Gate, Look Down, Use the
        Lift, Pick Flowers
    """),
    "activity": _list("""
        Ball Games, Camping, Cycling, Diving, Drones, Entry, Fishing, Food or Drink, Left Turn, Parking,
        Phones, Photos, Refunds, Running, Shouting, Skating, Smoking, Swimming, Trespassing, Whistling
    """),
    "hazard": _list("""
        Wet Floor, Low Ceiling, Hot Surface, Steep Hill, Loose Rocks, Falling Ice, Deep Water, Slippery Road,
        Moving Parts, High Voltage, Strong Winds, Sharp Bend, Thin Ice, Wet Paint, Low Bridge, Heavy Trucks,
        Rough Sea, Soft Sand
    """),
    "danger": _list("""
        the Dog, the Geese, Sharks, Thin Ice, Falling Rocks, Quicksand, Bears, Trains, Sleepy Cats, Flying
        Balls, the Tide, Wild Boars, Snakes, Ducks, Children, Icicles, Deer, Low Planes
    """),
    "state": _list("""
        Left, Right, Out, Clear, Gate Closed, Off the Grass, Door Shut, Calm, Moving, Frozen, Away, Dry, Quiet
        Please, It Clean, Smiling, Upright, Dogs on Leash, Lights On, Hands Inside, Your Ticket
    """),
    "ask": _list("""
        Wait Here, Ring the Bell, Take a Seat, Mind the Step, Wipe Your Feet, Knock Twice, Pay at the Desk,
        Return Trays, Use Other Door, Queue Here, Speak Softly, Wash Hands, Drive Slowly, Recycle, Close the
        Gate, Be Patient, Mind Your Head, Stand Back
    """),
    "who": _list("""
        Staff, Members, Bicycles, Buses, Crew, Exit, Residents, Cash, Permit Holders, Pedestrians, Emergency
        Use, Deliveries, Adults, Authorized Staff, Guests, Taxis, Local Traffic, Players
    """),
    "verb": _list("""
        Begin, Breathe, Build, Create, Dance, Dream, Explore, Grow, Imagine, Laugh, Learn, Listen, Paint,
        Plant, Play, Read, Rest, Sail, Shine, Sing, Smile, Think, Travel, Wander, Wonder, Write
    """),
    "manner": _list("""
        Again, Every Day, Without Fear, Slowly, Out Loud, Together, Like the Wind, Under the Stars, All Night,
        Before Dawn, With Joy, Deeply, in the Rain, Big, Anyway, for a Living, Outside, Wide Awake, Like a
        Child, First
    """),
    "virtue": _list("""
        Balance, Beauty, Courage, Freedom, Gratitude, Harmony, Honesty, Hope, Joy, Justice, Kindness, Liberty,
        Love, Loyalty, Music, Patience, Peace, Reason, Science, Silence, Strength, Truth, Unity, Wisdom
    """),
    "device": _list("""
        System, Engine, Shield, Signal, Oxygen, Battery, Network, Reactor, Cargo, Payment, Download, Upload,
        Backup, Autopilot, Radar, Pump, Camera, Memory, Antenna, Airlock, Printer, Alarm, Rover, Thruster
    """),
    "status": _list("""
        Online, Offline, Ready, Lost, Low, Critical, Normal, Complete, Failed, Engaged, Restored, Updated,
        Locked, Full, Open, Armed, Paused, Connected
    """),
    "flown": _list("""
        Boarding, Delayed, Cancelled, Landed, Departed
    """),
    "side": _list("""
        Left, Right
    """),
    "letter": "ABCDEFGHJKLMNPRSTUVWXYZ",
    "month": _list("""
        January, February, March, April, May, June, July, August, September, October, November, December
    """),
    "weekday": _list("""
        Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
    """),
    "season": _list("""
        Spring, Summer, Autumn, Winter, Harvest
    """),
    "worn": _list("""
        weathered, rusty, freshly painted, faded, crooked, polished, mossy, hand-painted, scratched,
        brand-new, snow-covered, sunlit, dented, antique
    """),
    "material": _list("""
        wooden, metal, brass, enamel, stone, glass, plastic, cardboard, slate, copper, marble, steel,
        concrete, clay
    """),
    "colour": _list("""
        red, yellow, bright blue, dark green, orange, white, black, teal, purple, turquoise, pink, cream,
        silver, striped
    """),
    "indoors": _list("""
        a crowded train station, a quiet library, a small kitchen, an old theater lobby, a modern office, a
        hospital corridor, a school hallway, a busy airport, a cluttered workshop, a greenhouse, a museum
        hall, a hotel lobby, a supermarket, a laundromat, a subway station, a barn, an artist's studio, a
        basement
    """),
    "outdoors": _list("""
        a mountain trail, a frozen lake, a village square, a sandy beach, a foggy harbor, a desert highway, a
        rice field, a pine forest, a vineyard, a city park, a country road, a narrow alley, a lighthouse, a
        snowy pass, a canal, an old stone bridge, a wheat field, a playground, a waterfall, an orchard
    """),
    "light": _list("""
        at dusk, at dawn, under a cloudy sky, in soft morning light, at night under street lamps, in the
        golden hour, in heavy rain, in thick fog, under a starry sky, in bright midday sun, in the light of a
        single lamp, in candlelight, on a winter evening, after a summer storm
    """),
    "style": _list("""
        A realistic photograph, A watercolor painting, An oil painting, A cinematic still, A vintage postcard,
        A pencil drawing, A 3D render, A comic book panel, A close-up photo, A wide-angle photo, A children's
        book illustration, A pastel sketch, A pixel art image, A black and white photograph
    """),
    "finish": _list("""
        sharp focus, muted colors, vivid colors, film grain, highly detailed, with a blurred background, with
        long shadows, minimalist composition, seen from below, seen from across the street, with reflections
        on wet ground, with dust floating in the air
    """),
    "letters": _list("""
        in bold letters, in elegant script, in block capitals, in neat handwriting, in chalky strokes, in
        large print, in faded ink, in gold leaf, in white stencil, in curly letters, in a retro font, in thin
        capitals, in playful letters
    """),
    "event": _list("""
        a cyclist rides past, two friends share an umbrella, a dog chases a ball, an old man reads a newspaper,
        a delivery truck backs into a driveway, children fly a kite, a street musician plays the violin, a gardener
        waters the flowers, someone pours a cup of tea, a cat sleeps on a windowsill, a photographer sets up a tripod,
        a painter climbs a ladder, three students compare their notes, a crane lifts a heavy beam, a waiter carries a
        full tray, a balloon drifts away, a woman ties her shoes, a tram turns the corner, a flag flutters in the wind,
        steam rises from a pot
    """),
    "things": _list("""
        potted plants, curious cats, hurrying commuters, stacked crates, fallen leaves, paper lanterns, old
        books, parked bicycles, market stalls, tall grass, tourists taking pictures, wildflowers, drifting
        snow, coils of rope, scattered tools, colorful balloons, empty chairs, pigeons, strings of lights,
        wooden barrels
    """),
    "lamp": _list("""
        in soft morning light, lit by a single lamp, in candlelight, under fluorescent tubes, in warm evening
        light, in the glow of neon, beside a sunny window, late at night, in dim light, under a skylight
    """),
}  # fmt: skip
"""Those of targets begin with capitals; the others are for scenes."""

TRAIN_SCENES = _scenes("""
notice way: {style} of a {worn} {material} sign beside {outdoors} that reads {text} {letters}
notice: A {colour} warning sign on a chain-link fence near {outdoors}, with the words {text}
notice: {style} of a notice taped to a door in {indoors}, saying {text} {letters}
notice way: A hiker stops at {outdoors} in front of a {worn} board reading {text}
notice date: A {material} plaque screwed to a brick wall in {indoors}, engraved with {text}
notice way: A traffic sign half hidden by branches near {outdoors} shows {text} {letters}
notice: Yellow tape stretched across {indoors}, printed with {text}
way: {style} of an overhead highway panel with {text} {letters}, cars passing below
notice: A handmade poster on a pillar in {indoors} says {text}
notice: A swing gate near {outdoors} carries a {colour} board with the text {text}
way: A tram with the destination {text} above its windshield, passing {outdoors}
shop: {style} of a shop front with a {colour} awning and the name {text} {letters}
shop: A neon sign glowing {colour} above a doorway spells {text}
shop: The side of a {colour} delivery van near {outdoors} is painted with {text} {letters}
shop: A {worn} {material} hanging sign with the name {text}, swinging above a cobbled street
shop label: A paper shopping bag on a counter in {indoors}, printed with {text} {letters}
shop motto: A barista hands over a paper cup with the words {text} in {indoors}
shop: A glass door in {indoors} etched with {text}, seen from inside
shop date: A {worn} ship moored in a harbor, its bow lettered {text}
offer: A chalkboard on the sidewalk near {outdoors} announces {text} {letters}
offer: {style} of a market stall near {outdoors} with a cardboard tag that says {text}
offer date: A {colour} banner across a store window reads {text} {letters}
offer: A {colour} food truck with a menu board offering {text}, customers waiting in line
offer date: A flyer pinned to a cork board in {indoors} promises {text} {letters}
offer motto: A billboard near {outdoors} advertises {text} {letters}
code: The departure board in {indoors} shows {text} in amber dots
code: {style} of a {colour} door with a {material} plate that reads {text}
code: A {worn} license plate on an old {colour} car reads {text}
code: A luggage tag tied to a suitcase in {indoors}, stamped {text}
code title: A ticket stub on a table in {indoors}, printed with {text} {letters}
code word: A row of metal lockers, one of them labeled {text} {letters}
code: A shipping container painted {colour} with {text} {letters} on its side
date: A {material} cornerstone in an old wall, carved with {text}
date: {style} of a calendar page on a wall in {indoors}, showing {text}
date: A {worn} medal on a velvet cushion, engraved with {text}
date greeting: A festival banner strung between two trees near {outdoors} says {text} {letters}
date: A sealed letter on a desk in {indoors}, dated {text}
motto: {style} of a brick wall with a mural that says {text} {letters}
motto title: A {colour} T-shirt on a clothes line near {outdoors}, printed with {text} {letters}
motto: A coffee mug on a desk in {indoors} with the slogan {text}
motto: An embroidered cushion on an armchair with the words {text} stitched in {colour} thread
motto word: A skateboard leaning on a railing near {outdoors}, its deck painted with {text}
motto: A poster in {indoors} that reads {text} {letters}
motto word: A tattoo on a forearm that reads {text} in thin lines
motto word: A kite flying over {outdoors} with {text} on its sail
title: {style} of an open book on a bench near {outdoors}, its title page reading {text}
title: A movie poster on a wall in {indoors} with the title {text} {letters}
title: A vinyl record cover in {colour} with the album name {text}
title: The marquee of an old cinema shows {text} {letters}
title: A row of old books, the thickest of them titled {text} {letters}
title: A board game box on a shelf in {indoors}, named {text}
message: The screen of a smartphone on a table in {indoors} displays {text}
message: A spaceship cockpit with the message {text} on its main display
message: An old computer terminal in {indoors} with {text} in green letters
message: A smartwatch on a wrist near {outdoors} showing {text}
message: A friendly robot with a {colour} chest panel that displays {text}
message code: An arcade machine in {indoors} with {text} on its glowing screen
message offer: A digital billboard over a busy crossing flashes {text}
label: A glass jar with a paper label reading {text} {letters} on a shelf in {indoors}
label: {style} of a tin can with a {colour} label that says {text}
label code: A wooden crate near {outdoors}, stenciled with {text}
label: A bottle on a windowsill with the label {text} {letters}
label word: A row of spice boxes, the {colour} one marked {text} {letters}
greeting: A birthday cake with {text} written in icing, on a table in {indoors}
greeting: A paper banner in {indoors} with {text} in {colour} letters
greeting word: Words written in the sand near {outdoors}: {text}
greeting: A greeting card on a desk in {indoors}, its front saying {text} {letters}
greeting: A child holds up a cardboard sign with {text} in {indoors}
greeting word: An airplane above {outdoors} writes {text} in white smoke
word: {style} of wooden letter blocks that spell {text}
word: The word {text} carved into the bark of a tree near {outdoors}
word code: Magnets on a {colour} refrigerator forming {text}
word motto: Graffiti on a train car reading {text} in {colour} paint
word: The word {text} formed by the lit windows of a skyscraper
""")
TEST_SCENES = _scenes("""
notice: A lifeguard tower near {outdoors} with a {worn} board reading {text}
notice: An elevator in {indoors} with a small plate that says {text} {letters}
way: A signpost at a crossroads near {outdoors}, one arm of it marked {text}
shop: {style} of a corner store with {text} painted on its window {letters}
shop: A {colour} bicycle basket with the shop name {text} near {outdoors}
offer: A {colour} sandwich board outside a diner says {text} {letters}
code: A railway car with {text} stenciled under its windows
code: A boarding pass held in a hand in {indoors}, showing {text}
date: A {material} bench near {outdoors}, inscribed with {text}
motto: A canvas tote bag on a hook in {indoors}, printed with {text} {letters}
motto: A bumper sticker on a {worn} pickup truck reads {text}
title: A magazine on a newsstand, called {text} {letters}
title: A playbill glued to a {colour} wall announces {text}
message: The dashboard of a car near {outdoors} shows {text}
message: A hologram above a desk in {indoors} reads {text}
label: A burlap sack in {indoors}, printed with {text} {letters}
label: A medicine bottle with the label {text} on a {material} tray
greeting: Sparklers at night write {text} in trails of light
greeting: A bouquet of roses with a card that says {text} {letters}
word: Dominoes on a table in {indoors}, laid out to form {text}
word: A cloud shaped like the word {text} above {outdoors}
""")
ENDINGS: Sequence[str] = (
    "", ", {light}", ", {finish}", ", surrounded by {things}", ", surrounded by {things}, {light}",
    ", {light}, surrounded by {things}, {finish}", ", with {things} all around, {light}",
    ", {light}, while {event}", ". In the background, {event}, surrounded by {things}, {finish}",
    ", {light}, {finish}. Nearby, {event}",
)  # fmt: skip
"""Of scenes; `{light}` is `{lamp}` where the scene is indoors."""
