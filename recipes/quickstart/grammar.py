"""A small grammar of customer messages to a mail-order shop.

A message tells how a product was at the start, how it is now, and often who handled it in between.
Its label follows from that story, not from single words:

    no_problem    good at the start, good now (whoever touched it)
    solved        bad at the start, good now (whoever put it right)
    unsolved      bad at the start, bad now (whoever tried)
    broke_later   good at the start, bad now: by itself, or after the shop's people handled it
    own_fault     good at the start, bad now, since somebody of the customer's household handled it

Each state may be said plainly ("it leaks") or by denying its opposite ("it does not work"), the two
states come in either order, and people who only stood by are named next to those who did something.
Every third word of each word list is held out of the labelled training texts; validation, test and
the unlabelled pretraining passages use the whole lists.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

LABELS = ("no_problem", "solved", "unsolved", "broke_later", "own_fault")


def words(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [" ".join(item.split()) for item in text.split(",") if item.strip()]


@dataclass(frozen=True)
class Words:
    """The words for one group of products (or, in SHARED, for all of them)."""

    products: list[str]
    good_verbs: list[str]
    bad_verbs: list[str]
    good_adjectives: list[str]
    bad_adjectives: list[str]
    faults: list[str]


SHARED = Words(
    products=[],
    good_verbs=words("""work, function, behave, serve me well, do its job, please us, perform well,
        satisfy me, do what it should"""),
    bad_verbs=words("""fail, disappoint us, annoy me, cause trouble, let us down, play up,
        give me grief, act up, drive me mad"""),
    good_adjectives=words("""fine, perfect, flawless, faultless, good, excellent, reliable, sound,
        impeccable, great, splendid, superb, dependable, intact, decent, in order, wonderful,
        in good shape"""),
    bad_adjectives=words("""faulty, defective, useless, broken, damaged, awful, dreadful, terrible,
        unusable, poor, hopeless, unreliable, bad, shoddy, miserable, worthless, horrible,
        in bad shape"""),
    faults=words("""fault, defect, flaw, problem, weakness, hitch, crack, scratch, dent, chip,
        loose screw, blemish"""),
)

GROUPS = [
    Words(
        products=words("""kettle, toaster, coffee maker, espresso machine, blender, mixer, juicer,
            dishwasher, fridge, freezer, oven, stove, microwave, rice cooker, waffle iron, dryer,
            food processor, washing machine, steam iron, hob, grill, fryer, bread maker, ice maker,
            water filter, vacuum cleaner, fan, heater, humidifier, boiler, pump, slow cooker"""),
        good_verbs=words("""heat up, start, run smoothly, switch on, hold the temperature,
            turn evenly, keep pace, obey the timer, spin freely"""),
        bad_verbs=words("""leak, drip, overheat, smoke, rattle, hum, hiss, smell, jam, stall, spark,
            trip the fuse, stink, splutter, clog, squeal, burn, shudder"""),
        good_adjectives=words("""quiet, clean, tight, watertight, powerful, thorough, safe, silent,
            efficient, quick, spotless, economical"""),
        bad_adjectives=words("""leaky, noisy, clogged, blocked, rusty, loud, weak, scorched, mouldy,
            sluggish, dirty, smelly"""),
        faults=words("""leak, loose wire, blocked valve, broken seal, bad smell, burnt plug,
            rusty spring, worn belt, cracked lid"""),
    ),
    Words(
        products=words("""lamp, radio, speaker, headset, printer, scanner, keyboard, mouse, monitor,
            tablet, laptop, phone, camera, projector, television, router, alarm clock, watch,
            charger, doorbell, thermostat, game console, microphone, webcam, torch, turntable,
            smoke alarm, baby monitor, drone, calculator, power bank, amplifier"""),
        good_verbs=words("""start, respond, charge, connect, switch on, react at once,
            hold a charge, wake up, keep time"""),
        bad_verbs=words("""crash, freeze, flicker, buzz, overheat, beep, crackle, lag, stall, hum,
            drain the battery, blink, lose the signal, hang, glitch, restart, rattle, whine"""),
        good_adjectives=words("""fast, stable, responsive, bright, clear, sharp, quick, quiet,
            precise, crisp, accurate, smooth"""),
        bad_adjectives=words("""dead, slow, unstable, blurred, dim, unresponsive, mute, frozen,
            sluggish, noisy, garbled, laggy"""),
        faults=words("""dead pixel, loose contact, short circuit, weak battery, broken button,
            loose cable, bad chip, blown fuse, torn wire"""),
    ),
    Words(
        products=words("""chair, table, desk, shelf, wardrobe, bookcase, bed, sofa, armchair, stool,
            bench, cabinet, dresser, cupboard, nightstand, sideboard, coat rack, mirror, cot,
            bunk bed, footstool, swivel chair, ladder, folding table, shoe rack, workbench,
            rocking chair, deck chair, high chair, wine rack, drawer unit, tea trolley"""),
        good_verbs=words("""stand firmly, hold, fit together, stand straight, bear the load,
            close neatly, look right, fold neatly, stay in place"""),
        bad_verbs=words("""wobble, creak, tilt, sag, squeak, lean, sway, come apart, stick, buckle,
            tip over, peel, groan, splinter, collapse, rock, warp, stain the floor"""),
        good_adjectives=words("""sturdy, stable, solid, firm, level, straight, steady, smooth,
            comfortable, strong, even, robust"""),
        bad_adjectives=words("""wobbly, crooked, bent, loose, unsteady, rickety, uneven, warped,
            shaky, lopsided, flimsy, brittle"""),
        faults=words("""bent leg, split board, broken hinge, missing bolt, rough edge, torn cover,
            loose joint, broken slat, stripped thread"""),
    ),
    Words(
        products=words("""tent, backpack, umbrella, jacket, bicycle, scooter, suitcase, raincoat,
            sleeping bag, air mattress, hammock, canoe, kayak, helmet, stroller, wheelbarrow,
            lawn mower, garden hose, watering can, parasol, gazebo, trolley, skateboard, sledge,
            rucksack, handbag, gym bag, car seat, bike trailer, fishing rod, awning, cool box"""),
        good_verbs=words("""hold, close properly, keep the rain out, fit, fold neatly, last,
            open easily, stay dry, stand up to the wind"""),
        bad_verbs=words("""leak, tear, squeak, fray, pinch, chafe, sag, jam, drip, rub, slip,
            come apart, rattle, fade, stick, snag, crumple, smell"""),
        good_adjectives=words("""sturdy, waterproof, tough, light, comfortable, robust, tight,
            durable, strong, dry, handy, roomy"""),
        bad_adjectives=words("""torn, leaky, bent, ripped, damp, flimsy, stiff, frayed, mouldy,
            rusty, brittle, soggy"""),
        faults=words("""hole, broken zip, torn seam, bent pole, loose strap, broken clasp,
            missing buckle, jammed wheel, leak"""),
    ),
]

SHOP = words("""your courier, your technician, the driver, your engineer, the fitter,
    your repairman, the delivery man, your service team, one of your people, your mechanic,
    the workshop, the installer, your colleague, the carrier, your partner firm,
    your shop assistant, a man from your shop, the delivery crew, your electrician, your trainee,
    the van driver, your specialist, the service partner, your apprentice""")
HOUSEHOLD = words("""I, my son, my daughter, my husband, my wife, my nephew, I, my cousin,
    my mother, my father, my brother, my flatmate, I, our babysitter, my uncle, a friend of mine,
    my grandson, my partner, my aunt, my niece, my roommate, my grandfather, my sister,
    our lodger""")
# "past | participle" with @ for the product.
NEUTRAL = words("""took @ apart | taken apart, cleaned @ | cleaned, adjusted @ | adjusted,
    opened @ | opened, moved @ | moved, took @ outside | taken outside, reset @ | reset,
    turned @ over | turned over, oiled @ | oiled, carried @ upstairs | carried upstairs,
    set @ up afresh | set up afresh, washed @ | washed, inspected @ | inspected,
    tested @ | tested, dismantled @ | dismantled, checked @ | checked, polished @ | polished,
    rebuilt @ | rebuilt, tinkered with @ | tinkered with, worked on @ | worked on,
    wiped @ | wiped, lifted @ | lifted, shook @ | shaken, modified @ | modified""")
HARM = words("""dropped @ | dropped, knocked @ over | knocked over, kicked @ | kicked,
    spilled tea over @ | soaked with tea, left @ in the rain | left in the rain,
    hit @ | hit, bumped into @ | bumped, scraped @ | scraped, threw @ around | thrown around""")
REPAIR = words("""repaired @ | repaired, mended @ | mended, patched @ | patched,
    replaced a part of @ | given a new part, fixed @ | fixed, overhauled @ | overhauled,
    serviced @ | serviced, glued @ | glued, restored @ | restored""")

# <a|b|c> is a choice. S0 and S1 are the states at the start and now; C1 is the state now said as a
# change ("no longer"), K1 as a continuation ("still"); T is what somebody did in between.
CHANGED = [
    "<FIRST> S0, but <NOW> S1.",
    "<NOW> S1, <although|though|even if> <FIRST> S0.",
    "S0 <for two weeks|for a while|in the first days>, but <NOW> S1.",
    "S0 when @ <came|arrived|was delivered>; <NOW> S1.",
    "<NOW> S1, whereas <FIRST> S0.",
    "<Who would have thought it|A short history>: <FIRST> S0, and <NOW> S1.",
]
CHANGED_BY = [
    "S0 until T, and since then S1.",
    "Before T, S0; <afterwards|since then|now> S1.",
    "T, and now S1, while <before|earlier> S0.",
    "Ever since T, S1; before that, S0.",
    "<NOW> C1 because T, <although|though> <FIRST> S0.",
    "T, and from that day on C1.",
    "<NOW> C1. T, and that made the difference.",
    "<FIRST> S0. Then T, and <ever since|since that day> C1.",
    "S1 <NOW>, but only since T; <FIRST> S0.",
]
SAME = [
    "<FIRST> S0, and <NOW> K1.",
    "<NOW> K1, just as <FIRST> S0.",
    "K1 <NOW>, and <FIRST> S0 as well.",
    "Nothing has changed with @: <FIRST> S0, and K1.",
]
SAME_AFTER = [
    "<Although|Though> T, K1, and <FIRST> S0 as well.",
    "T, but that changed nothing: S0 before, and K1.",
    "S0 before T, and <NOW> K1.",
    "Even after T, K1.",
    "<FIRST> S0. Then T, and yet K1.",
    "K1 <NOW>, although T; <FIRST> S0 too.",
]
CHOICES = {
    "FIRST": words("""at first, in the beginning, on the first day, out of the box, at the start,
        in the first week, on arrival, to begin with"""),
    "NOW": words("now, today, these days, by now, at the moment, this week, as of today"),
}
MONTHS = words("January, February, March, April, May, June, July, August, September, October")
NOTES = [
    "I bought @ in <MONTHS>.",
    "I ordered @ from you <last month|in spring|some weeks ago|for my birthday>.",
    "This is about @ from my <last|second|latest> order.",
    "A word about @ <from your catalogue|I got from you|that you sent me>:",
    "Hello, I am writing about @.",
]
# Pretraining passages end with what the customer asks for and with the shop's reply.
CLOSINGS = {
    "no_problem": ["I only wanted to say thanks.", "I would buy @ again at any time."],
    "solved": ["Thank you, you can close the case.", "So nothing is left to be done."],
    "unsolved": ["I want a new one or my money back.", "Please take @ back at last."],
    "broke_later": ["Does the guarantee cover this?", "Please have @ collected for repair."],
    "own_fault": ["What would a repair cost me?", "I know that I have to pay for this myself."],
}
# [now glad/sorry] is the first word if the product is good now, [start smooth/rough] if it was good
# at the start, [own yours/ours] if the customer's household handled it.
REPLIES = [
    "We are [now glad/sorry] to hear this.",
    "How [now nice/sad] that E1.",
    "That is [now good/bad] news: E1.",
    "The start was [start smooth/rough], the end is [now happy/sad].",
    "After a [start smooth/rough] start we are [now glad/sorry] that E1.",
    "You [now keep/return] @ then.",
]
DEED_REPLIES = [
    "That was [own yours/ours] to do.",
    "We are [now glad/sorry], and what was done to @ was [own yours/ours] to do.",
]
# Reviews are part of the pretraining text only: they say several things of one kind in a row.
REVIEWS = [
    "I [now love/hate] @: R.",
    "A [now wise/foolish] buy: R.",
    "We [now like/dislike] @, for R.",
    "[now Great/Bad] news: R.",
    "R. In short, I am [now happy/unhappy] with @.",
    "R. So I [now keep/return] @.",
    "R. My advice is [now yes/no].",
]
JUDGING = sorted({
    word.lower()
    for text in REPLIES + DEED_REPLIES + REVIEWS
    for pair in re.findall(r"\[\w+ (\w+)/(\w+)\]", text)
    for word in pair
})  # fmt: skip

# In the reply it is the shop that speaks.
SWAP = {"I": "you", "me": "you", "us": "you", "my": "your", "our": "your", "your": "our"}

IRREGULAR = {
    "run": "ran", "hold": "held", "keep": "kept", "spin": "spun", "do": "did", "let": "let",
    "give": "gave", "drive": "drove", "freeze": "froze", "lose": "lost", "hang": "hung",
    "wake": "woke", "stand": "stood", "bear": "bore", "fit": "fitted", "stick": "stuck",
    "come": "came", "tear": "tore", "burn": "burnt", "stink": "stank",
}  # fmt: skip
DOUBLED = {"trip", "drip", "hum", "jam", "lag", "clog", "sag", "tip", "rub", "slip", "snag"}
DOUBLED |= {"run", "spin", "let", "fit"}


def inflect(verb: str, form: str) -> str:
    """The verb as "s" (it leaks), "ed" (it leaked) or "ing" (leaking); its first word changes."""
    head, *rest = verb.split()
    stem = head + head[-1] if head in DOUBLED and form != "s" else head
    if form == "s":
        head += "es" if re.search("(s|sh|ch|x|o)$", head) else "s"
        head = re.sub("([^aeo])ys$", r"\1ies", head)
    elif form == "ed" and head in IRREGULAR:
        head = IRREGULAR[head]
    elif form == "ed":
        head = re.sub("([^aeo])yed$", r"\1ied", stem + ("d" if stem.endswith("e") else "ed"))
    else:
        head = (stem[:-1] if re.search("[^eo]e$", stem) else stem) + "ing"
    return " ".join([head, *rest])


class Writer:
    """Writes messages; with `seen_only` it leaves out every third word of each list."""

    def __init__(self, seed: int, seen_only: bool = False) -> None:
        self.rng = random.Random(seed)
        self.seen_only = seen_only

    def pick(self, items: list[str]) -> str:
        """One of the items that this writer may use."""
        if self.seen_only:
            items = [item for i, item in enumerate(items) if i % 3 != 2]
        return self.rng.choice(items)

    def message(self, label: str, passage: bool = False) -> str:
        """One message with this label; a `passage` also has a closing and the shop's reply."""
        while True:
            self.group = self.rng.choice(GROUPS)
            self.story(label)
            product = self.pick(self.group.products)
            text = self.body()
            # A note names the product first, so "it" would be unclear after another item's aside.
            opening = self.rng.random()
            if opening < 0.2:
                text = self.other_item(product) + " " + text
            elif opening < 0.4:
                text = self.promise() + " " + text
            if opening > 0.3 and self.rng.random() < 0.4:
                text = self.rng.choice(NOTES) + " " + text
            if passage and self.rng.random() < 0.2:
                text += " " + self.rng.choice(CLOSINGS[label])
            if not 8 <= len(text.split()) <= 32:
                continue
            if passage:
                replies = REPLIES + DEED_REPLIES * 2 if self.handled else REPLIES
                text += " Reply: " + self.rng.choice(replies)
            return self.finish(text, product)

    def review(self) -> str:
        """A product review for pretraining."""
        self.group = self.rng.choice(GROUPS)
        self.now_good = self.rng.random() < 0.5
        when = self.rng.choice(["now", "past"])
        count = self.rng.randint(2, 4)
        states = [self.state(self.now_good, when, denial=0.1) for _ in range(count)]
        listed = ", ".join(states[:-1]) + " and " + states[-1]
        text = re.sub(r"\bR\b", listed, self.rng.choice(REVIEWS))
        return self.finish(text, self.pick(self.group.products))

    def story(self, label: str) -> None:
        """Set how it was, how it is, and who (if anybody) did what in between."""
        self.start_good = label in ("no_problem", "broke_later", "own_fault")
        self.now_good = label in ("no_problem", "solved")
        self.handled = label == "own_fault" or self.rng.random() < 0.7
        if label == "own_fault":
            self.own = True
        elif label == "broke_later":
            self.own = False
        else:
            self.own = self.rng.random() < 0.5
        other = REPAIR if label in ("solved", "unsolved") else HARM
        self.deeds = NEUTRAL if self.rng.random() < 0.65 else other

    def body(self) -> str:
        """A skeleton that fits the story."""
        if self.start_good == self.now_good:
            return self.rng.choice(SAME_AFTER if self.handled else SAME)
        return self.rng.choice(CHANGED_BY if self.handled else CHANGED)

    def promise(self) -> str:
        """What others said of the product: it says nothing about the label."""
        said = ["The leaflet says", "I was told", "A friend said", "The reviews said"]
        return f"{self.rng.choice(said)} that @ would {self.verb(self.rng.random() < 0.5)}."

    def other_item(self, product: str) -> str:
        """How another item of the same kind was: it says nothing about the label."""
        owner = self.pick(HOUSEHOLD)
        whose = "my old" if owner == "I" else owner + "'s"
        other = self.rng.choice([p for p in self.group.products if p != product])
        state = self.state(self.rng.random() < 0.5, "past")
        return state.replace("@", f"{whose} {other}") + "."

    def deed(self) -> str:
        """Who did what: one party acts, and sometimes somebody of the other party looks on."""
        actor = self.pick(HOUSEHOLD if self.own else SHOP)
        other = self.pick(SHOP if self.own else HOUSEHOLD)
        past, participle = self.pick(self.deeds).split(" | ")
        agent = "me" if actor == "I" else actor
        form = self.rng.random()
        if form < 0.45:
            return f"{actor} {past}"
        if form < 0.65:
            return f"@ was {participle} by {agent}"
        if form < 0.8:
            return f"{actor} {past} while {other} {self.rng.choice(['watched', 'waited'])}"
        if form < 0.9:
            return f"{actor}, not {'me' if other == 'I' else other}, {past}"
        return f"@ was {participle} by {agent} while {other} looked on"

    def verb(self, good: bool) -> str:
        """A verb for a good or a bad product."""
        name = "good_verbs" if good else "bad_verbs"
        return self.pick(getattr(self.rng.choice([SHARED, self.group]), name))

    def state(self, good: bool, when: str, denial: float = 0.25) -> str:
        """A clause on the product: `when` is past, now, change ("no longer") or still."""
        denied = self.rng.random() < denial
        kind = self.rng.choice(["verb", "verb", "adjective", "adjective", "fault"])
        if kind == "fault":
            denied = good
        source = self.rng.choice([SHARED, self.group])
        if kind == "verb":
            word = self.verb(good != denied)
            s, ed, ing = (inflect(word, form) for form in ("s", "ed", "ing"))
            plain = {
                "past": [f"@ {ed}", f"@ {ed} every time"],
                "now": [f"@ {s}", f"@ {s} every time"],
                "change": [f"@ has started to {word}", f"@ {s} all of a sudden"],
                "still": [f"@ still {s}", f"@ keeps {ing}"],
            }
            negated = {
                "past": [f"@ did not {word}", f"@ never {ed}", f"@ hardly ever {ed}"],
                "now": [f"@ does not {word}", f"@ never {s}", f"I cannot say that @ {s}"],
                "change": [f"@ no longer {s}", f"@ has stopped {ing}"],
                "still": [f"@ still does not {word}", f"I still cannot say that @ {s}"],
            }
        elif kind == "adjective":
            name = "good_adjectives" if good != denied else "bad_adjectives"
            word = self.pick(getattr(source, name))
            plain = {
                "past": [f"@ was {word}", f"I found @ {word}"],
                "now": [f"@ is {word}", f"I find @ {word}"],
                "change": [f"@ has become {word}", f"@ is suddenly {word}"],
                "still": [f"@ is still {word}", f"@ remains {word}"],
            }
            negated = {
                "past": [f"@ was not {word}", f"@ was anything but {word}"],
                "now": [f"@ is not {word}", f"nobody would call @ {word}"],
                "change": [f"@ is no longer {word}", f"@ is not {word} any more"],
                "still": [f"@ is still not {word}", f"@ is still anything but {word}"],
            }
        else:
            word = self.pick(source.faults)
            plain = {
                "past": [f"@ had a {word}", f"there was a {word} in @"],
                "now": [f"@ has a {word}", f"there is a {word} in @"],
                "change": [f"@ has got a {word}", f"there is suddenly a {word} in @"],
                "still": [f"@ still has a {word}", f"there is still a {word} in @"],
            }
            negated = {
                "past": [f"@ had no {word}", f"I did not see any {word} in @"],
                "now": [f"@ has no {word}", f"there is no {word} in @"],
                "change": [f"@ is rid of its {word}", f"the {word} of @ is gone"],
                "still": [f"@ still has no {word}", f"there is still no {word} in @"],
            }
        return self.rng.choice((negated if denied else plain)[when])

    def judge(self, match: re.Match[str]) -> str:
        """The word of a [kind good/bad] choice that fits the story."""
        truth = {"now": "now_good", "start": "start_good", "own": "own"}[match[1]]
        return match[2] if getattr(self, truth) else match[3]

    def finish(self, text: str, product: str) -> str:
        """Fill in states, deeds, choices and the product, and set the capitals."""
        fills = {
            "S0": lambda: self.state(self.start_good, "past"),
            "S1": lambda: self.state(self.now_good, "now"),
            "C1": lambda: self.state(self.now_good, "change"),
            "K1": lambda: self.state(self.now_good, "still"),
            "E1": lambda: self.state(self.now_good, "now"),
            "T": self.deed,
        }
        text = re.sub(r"\[(\w+) (\w+)/(\w+)\]", self.judge, text)
        text = re.sub(r"\b(S0|S1|C1|K1|E1|T)\b", lambda match: fills[match[1]](), text)

        def choose(match: re.Match[str]) -> str:
            names = match[1].split("|")
            if names == ["MONTHS"]:
                return self.rng.choice(MONTHS)
            return self.rng.choice(CHOICES.get(names[0], names))

        text = re.sub(r"<([^>]+)>", choose, text)
        message, mark, reply = text.partition("Reply: ")
        text = message + mark + re.sub(r"\b(I|me|us|my|our|your)\b", lambda m: SWAP[m[1]], reply)
        mentions = iter([f"{self.rng.choice(['the', 'my', 'the new', 'this'])} {product}"])
        text = re.sub("@", lambda _: next(mentions, "it"), text)
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        return re.sub(r"(^|[.?] |Reply: )([a-z])", lambda match: match[1] + match[2].upper(), text)
