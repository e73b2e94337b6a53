"""Documents as they are met, for the tests of filters and presets."""

PROSE = """\
The lighthouse stands on a narrow spit of land at the northern end of the bay. It was built in 1847, after three
merchant ships had been lost in a single winter, and its lamp could be seen from eighteen miles away on a clear night.
The first keeper, Thomas Aldridge, lived there with his wife and their four children for almost thirty years.

In the summer months the family grew vegetables in a walled garden behind the tower, where the stones kept off the wind.
Supplies came by boat every second week if the sea allowed it. When it did not, they ate what they had stored in the
cellar: salted fish, potatoes, and the apples that Mrs. Aldridge dried on strings above the stove.

The lamp burned whale oil at first and paraffin from 1872 on. Electricity reached the spit only after the war, and with
it came the first proposals to let the light run without a keeper. The last one left in 1968. Since then the building
has been a museum, a hostel for walkers, and, for one unhappy season, a restaurant.

Visitors who climb the hundred and twelve steps are rewarded with a view of the whole coast. On the landward side, the
marshes stretch as far as the old railway; to the west, the cliffs rise where the river meets the sea. Many of the
birds that nest there can be watched with nothing more than patience and a pair of glasses.
"""

WIKIPEDIA = """\
Mount Erebus is the southernmost active volcano on Earth, located on Ross Island in the Ross Dependency in
Antarctica. With a summit elevation of 3,792 metres (12,441 ft), it is the second most prominent mountain in Antarctica.
The volcano has been active for around 1.3 million years and has a long-lived lava lake in its inner summit crater.

History

The volcano was discovered on 27 January 1841 by the polar explorer Sir James Clark Ross, who named it after one of his
ships, HMS Erebus. The name comes from Erebus, the personification of darkness in Greek mythology. Ross observed it in
eruption, and named the smaller volcano to the east after his other ship, HMS Terror.

Geology

Mount Erebus is part of the Pacific Ring of Fire in a broad sense, though it lies on a rift. Its lower part is a shield
volcano, and above it is a stratovolcano. The composition of the current products is a type of phonolite, with large
crystals of anorthoclase. These are called Erebus crystals, and are found all over the slopes near the summit.

Climbing

The first ascent was made in March 1908 by members of the expedition of Sir Ernest Shackleton. The party of six, which
included Edgeworth David and Douglas Mawson, reached the crater rim on the fifth day. In December 1912, a party led by
Raymond Priestley from the expedition of Robert Falcon Scott also climbed to the summit.
"""

GERMAN = """\
Der Leuchtturm steht auf einer schmalen Landzunge am nördlichen Ende der Bucht. Er wurde im Jahr 1847 gebaut,
nachdem in einem einzigen Winter drei Handelsschiffe verloren gegangen waren, und sein Licht war in klaren Nächten aus
einer Entfernung von achtzehn Meilen zu sehen. Der erste Wärter lebte dort mit seiner Frau und vier Kindern fast
dreißig Jahre lang.

In den Sommermonaten zog die Familie Gemüse in einem ummauerten Garten hinter dem Turm, wo die Steine den Wind
abhielten. Vorräte kamen jede zweite Woche mit dem Boot, wenn das Meer es zuließ. Wenn nicht, aß man, was im Keller
lagerte: gesalzenen Fisch, Kartoffeln und die Äpfel, die über dem Ofen auf Schnüren getrocknet wurden.
"""

MENU = """\
Home
About us
Our team
Careers
Products
Laptops and tablets
Phones
Accessories
Support
Contact
Find a store near you
Sign in
Create an account
Your cart is empty
Search the shop
Gift cards
Returns and refunds
Track the order
Shipping to the islands
Blog
Press
Investors
Follow us on the web
Newsletter
Subscribe with e-mail
Terms
Sitemap
English
Back to top
Copyright of the shop 2024
All rights reserved.
Made with love.
Thanks!
Bye.
Have a nice day.
"""

SPAM = "\n".join(
    f"Buy cheap watches online in {town} and save with the best cheap watches online, buy cheap watches online today."
    for town in ("London", "Paris", "Boston", "Madrid", "Vienna", "Oslo", "Dublin", "Lisbon", "Athens", "Prague")
)

PYTHON = '''"""Bounded caches."""

import threading
from collections import OrderedDict


class LRUCache:
    """A dictionary of limited size that forgets what was used least recently."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key, default=None):
        with self._lock:
            if key not in self._items:
                return default
            self._items.move_to_end(key)
            return self._items[key]

    def put(self, key, value):
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            if len(self._items) > self._size:
                self._items.popitem(last=False)

    def stats(self):
        return {"size": len(self._items), "limit": self._size}
'''
