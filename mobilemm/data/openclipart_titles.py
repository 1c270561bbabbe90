"""What has to be known about the titles in Debian's openclipart packages to caption their pictures.

Read by hand against the pictures of version 0.18+dfsg-19: which folders hold no nameable things, which titles
name only the collection that a picture came with, and captions for titles that are Italian or French.
"""

from __future__ import annotations

import re

REJECTED_FOLDERS = (
    "shapes/",
    "special/",
    "logos/",
    "buttons/",
    "decorations/",
    "recreation/games/cards/",
    "recreation/religion/",
    "signs_and_symbols/flags/",
    "signs_and_symbols/led/",
    "people/clothing/pantyhose/",
    "geography/aus",
    "people/people_juliane",
)

# Titles that a whole batch of files carries: the file name says more.
UNINFORMATIVE_TITLES = re.compile(
    r"^clipart by nicu|etiquette icons|r1[56] |homes clipart|menu c|map symbols|various cliparts|aiga"
    r"|^advertising$|svg gradient|flat icon|^chess pieces$|^balloons-aj$|boating rules",
    re.IGNORECASE,
)

# Folders whose every picture shows one kind of thing, whatever its title says.
FOLDER_NOUNS = {
    "birds": "bird",
    "dinosaurs": "dinosaur",
    "bears": "bear",
    "horses": "horse",
    "dogs": "dog",
    "housecats": "cat",
    "fish": "fish",
    "homes": "house",
    "hats": "hat",
    "smilies": "smiley face",
    "stickmen": "stick figure",
    "flowers": "flower",
    "bulb": "light bulb",
    "battery": "battery",
}

# `title: caption`; a title without caption drops its picture.
_TABLE = """
8 ball: eight ball; 8_ball_jarno_vasamaa: eight ball; 8ball_form_jarno_vasama:
8ball_nicu_buculei: eight ball; 9 ball: nine ball; 9_ball_jarno_vasamaa: nine ball; 9ball_form_jarno_vasama:
a boy plays soccer: boy playing soccer; a youngster: boy; abeille: bee
abitazione villa con giardino: villa with a garden; abracadabra:; acquila: eagle; advertising:; aerobics:
africa: map of africa; africandrum: african drum; aglio: garlic; ahead_only:
aiga_toilet_men1: men's toilet sign; aiga_toilet_men_: men's toilet sign
aiga_toilet_women1: women's toilet sign; aiga_toilet_women_: women's toilet sign; air:; ak: rifle; aktion:
al bar:; albero: tree; ambulans: ambulance; ambulanza: ambulance; amibe:
ampelfrau: pedestrian traffic light; ampelmaennchen: pedestrian traffic light; anatra: duck
antilope: antelope; ape_miele: bees on a honeycomb; apple bitten: bitten apple
apple with worm: apple with a worm; apple_martin_schmidt-li: apple; applf: apple; appunti: notes
aquila frontale: eagle; arbre modern: tree; arbre modern bw: tree in black and white; argentina:; armenia:
arrow-heart: heart with arrow; asse_da_stiro: ironing board
attaccapanni_con_vestito_da_donna: woman's suit on a hanger; attenzione: warning sign
attenzione rotondo: warning sign; australian maps:; autos: car; b w tiger: tiger in black and white
baby tux: penguin; baby-tux: penguin; bach cartoon bust: man with a wig
backpacker heavy load: backpacker with a heavy load; bad guy fr: bad guy; ball: ball; ball form:
balloon-black-aj: black balloon; balloon-blue-aj: blue balloon; balloon-green-aj: green balloon
balloon-orange-aj: orange balloon; balloon-purple-aj: purple balloon; balloon-red-aj: red balloon
balloon-white-aj: white balloon; balloon-yellow-aj: yellow balloon; balloons-aj: balloons; baloon1: balloon
baloon1_01: balloon; baloon1_02: balloon; baloon1_03: balloon; baloon1_04: balloon; baloon1_05: balloon
baloon2_01: balloon; baloon2_02: balloon; baloon2_03: balloon; baloon2_04: balloon; baloon2_05: balloon
barattolo di pillole: pill bottle; base:; beethoven cartoon bust: bust of a man
bejewelled crown with three risers: crown; betoniera: concrete mixer; biberon: baby bottle
bicicletta cycle: cyclist; binocolo bn: binoculars; biodegradable:; biohazard symbol: biohazard symbol
bird of peace: dove of peace; birds/duck_yellow_ii_kurt_cagl_:; blazer: car; blocco_ghiaccio: block of ice
blocco_notes: notepad; blots:; blowling ball: bowling ball; blueman: blue stick figure
bluewhale-md: blue whale; bmw z from top: car seen from above; boating rules illustration:; bobi: dog
bobine: film reel; bofish: fish; books-aj.svg: books; borsa estiva: summer bag; borsetta: handbag
bottiglia di vino pregiato: bottle of wine; box: box; boy symbol: boy; brazil: map of brazil
brazil states: map of brazil; break:; buddy01: person; buddy02: person; bulb: light bulb
bus bw: bus in black and white; bussiness woman donna in carriera: business woman; bussola: compass
busy mom with child and pets: mother with child and pets; butterfly from star: butterfly
bypasslopper: pruning lopper; bypasspruner: pruning shears; calamita: magnet; calcolatrice: calculator
calzettoni: socks; camicia in seta: silk shirt; cammello: camel; canada - new brunswick:
canada flag umbrella: umbrella with the flag of canada; candela: candle; canguro: kangaroo
cani e gatti , cat and dog: cat and dog; capsized sailing illustration: capsized sailboat
car ride: man driving a car; card figure - jack: jack of cards; card figure - joker: joker of cards
card figure - king: king of cards; card figure - queen: queen of cards; card figures - club: club card suit
card figures - diamond: diamond card suit; card figures - heart: heart card suit
card figures - spade: spade card suit; carnegie library building: library building; carpentiere1: carpenter
carpentiere2: carpenter; carpentiere3: carpenter; carretta_da_cantiere: wheelbarrow; carta:
carte de france: map of france; casa dei sogni: house; casa in campagna: house in the country
casa plurifamigliare: apartment house; casa verde: green house; casco con microfono: headset
cassa d'epoca: antique cash register; cassa negozio: cash register; cassette video: video cassette
castle - rpg map elements: castle; cat scrathing post: cat scratching post; cavalletta: grasshopper
cavallo: horse; cayenne pepper , simple: cayenne pepper; cayennepepperrevisited: cayenne pepper
cd: compact disc; cestino pieno: full waste basket; cestino vuoto: empty waste basket; cesto: basket
ch_teau-fort_01: castle; chalet di montagna architetto francesco rollandin: chalet; chat:
chat icon: speech bubble; chateau: castle; chav:; chemical science experience: chemistry experiment
chesspieces-bishop: chess bishop; chesspieces-king: chess king; chesspieces-knight: chess knight
chesspieces-pawn: chess pawn; chesspieces-queen: chess queen; chesspieces-rook: chess rook
chevrolet celebirty sedan: sedan car; chevrolet celebrity wagon: station wagon; chiave: key
chibi character:; chodovian's dog by mikol ale:; cigni bianchi e neri: black and white swans; cigno: swan
cigno di notte nella palude: swan at night; cigno di spalle: swan; cinepresa: movie camera
city horizon: city skyline; ciuccio: pacifier; clessidra: hourglass; clips: paper clips; clock01: clock
close hauled (sailing):; cloudy01: cloudy sky; cloudy02: cloudy sky; cloudy03: cloudy sky; cm1:
coccinella: ladybug; coccinella rollandin: ladybug; coccinelle: ladybug; coccinellona: ladybug
coffe,tea: cup of coffee; cog: gear wheel; colombo: pigeon; colombo2: pigeon; color tiger: tiger
come si dispongono le posate: table setting; computer: computer; computer-keyboardlayout-de:
condominio: apartment building; coniglio: rabbit; contour_bat: bat; copper the beagle: beagle dog
copyright: copyright symbol; cormorant-md: cormorant; cornetto: ice cream cone; corridore: runner
couronne: crown; cronometro: stopwatch; crop marks:; cross hand drawn: hand-drawn cross
crossbones: crossed bones; crystal:; cup: cup; cuppa schwoo: cup; denmark - jutland:; dente: tooth
derbouk: darbuka drum; desktop: desktop computer; diagramma: diagram; dino: dinosaur; dinosauri: dinosaurs
dinosauro: dinosaur; disability sign: wheelchair sign; disk:; djambe drum: djembe drum
do not enter sign: do not enter road sign; dodge neon (green): green car; dodge neon (pink): pink car
dog drawn with straight lines: dog; dog drawn with straight lines (wizard costume): dog in a wizard costume
dog on leash: dog on a leash; domo kun:; don't panic:; donna incinta: pregnant woman; donna_casinista:
dossier:; double croche: musical note; double note: musical note; double note two: musical note
doublesight dual monitor: two monitors; ear - body part: ear; earth and north star: earth and stars
earth globe: globe; easter:; ec .py:; egg on muffin: egg on a muffin; elder sign:; elefante: elephant
elefante_in_corsa: running elephant; elefantone: elephant; emperor penguin: penguin; empty tomb:
emule_icon_emule.org:; engrenagem: gear wheel; enthusiast: man; envelop: envelope; eris apple: golden apple
esperimento chimico: chemistry experiment; etiquette printer: printer; etiquette scanner: scanner
europe: map of europe; evolution steps: human evolution; ex:; fabbrica: factory
fall coloured leaf: autumn leaf; fall coloured tree: autumn tree; fall scene in a circle: autumn landscape
farfalla contorno: butterfly; farfalla semplice: butterfly; farfalla stilizzata: butterfly
farmer_onelette: submarine sandwich; farmer_onelette_bw: submarine sandwich in black and white
fat man - interior of atomic bomb:; fata fatina: fairy; fatherchristmas: santa claus; fattoria: farm
female:; female silhouette: woman; female symbol: female symbol; ferro da stiro: iron; festoni: festoons
filmphoto: roll of film; fiocco: bow; fiore: flower; fire engine: fire engine; fire_stefan_bazelkov:
fireman alarm:; fireman wedding:; firewall: firewall; fitness:; flamand: flamingo
flamand_bw_jean-victor_b: flamingo; flaming soccer ball: soccer ball on fire; flan: flan
flat cake bw: flat cake in black and white; flat screen: flat screen monitor; flood:; flute in c: flute
foglie_arancioni: orange leaves; foglie_marroni: brown leaves; foglie_rosse: red leaves
foglie_verdi: green leaves; folder closed: closed folder; folder open: open folder; font samples:; food:
for sale sign template: for sale sign; forchettoni da grigliata: grill forks; formichina: ant
formicona: ant; frying pan (padella in italian): frying pan; full bloom: flower in full bloom
funny music note: musical note; funnyflower: flower; fuoco da campeggio: campfire
future beckham: boy playing soccer; gabbiano: seagull; gabbiano_piccolo: seagull; galette:
gallo di profilo: rooster; garmin handheld gps: handheld gps; gateau: cake; gattina cat: cat; gatto cat: cat
gatto nero: black cat; gelato all'italiana: ice cream; gender:; generic ticket: ticket
geography/europe_francesco_rollan_:; geography/europe_francesco_rolland_:; ghirlande_festa: party garlands
giardinaggio: gardening; gift01: wrapped gift; gift02: wrapped gift; gift03: wrapped gift
gift04: wrapped gift; gift05: wrapped gift; girl symbol: girl; glace: ice cream
glace bw: ice cream in black and white; glace italienne: ice cream cone
glace italienne bw: ice cream cone in black and white; gnome-dev-harddisk: hard disk; gnome-fs-client:
gnu/linux disco dance:; golf driver swing: golfer swinging a club; golf symbols:; gps geko: handheld gps
grampa'n gramma: grandparents; grape: grapes; grass hopper: grasshopper; grattacieli_grigi: grey skyscrapers
green burner:; guanti__e_pinze: gloves and pliers; gufo civetta: owl; guitar: guitar; guitar profile: guitar
gumnut black:; gumnut shaded:; gwen ha du:; habanero pepper , simple: habanero pepper; hacker_emblem:
handel cartoon bust: man with a wig; handphone: mobile phone; hat - clothing: hat; head1: person's head
head11: person's head; head12: person's head; head13: person's head; head14: person's head
head2: person's head; head3: person's head; head4: person's head; head5: person's head; head6: person's head
heart highlight: heart; heart left-highlight: heart; heart-arrow: heart with arrow
heart-ballons: heart balloons; hearth:; hedgeshear: hedge shears; heeling (sailing):
help-books-aj.svg: books; hide girl:; high tension danger: high voltage sign; hiker hiking: hiker
hill - rpg map elements: hill; home piche: house; homes clipart: house; hot surface danger: hot surface sign
hub:; human:; hummer: hummer car; icarus:; ice cream cone ( scoop): ice cream cone
ice cream cone ( scoop) (b and w): ice cream cone in black and white; ice water glass: glass of ice water
icons:; icthus: fish symbol; igloo: igloo; imbianchino_in_piedi: house painter; insetto: insect
iris and pupil: eye; irritant: irritant hazard sign; istogramma: bar chart; italy:; jazz: jazz musician
jibe diagram (sailing):; joystick beige gray: gray joystick; joystick black red: black and red joystick
kallisti-grenade:; karl iv:; keep tidy empty:; keep tidy inside:; keep tidy outside:; kexi:; kid: child
kiddy train: toy train; kids sailing: kids sailing a boat
knot illustration ( half hitches): half hitch knot; knot illustration (bowline): bowline knot
knot illustration (cleat hitch): cleat hitch knot; knot illustration (clove hitch): clove hitch knot
knot illustration (figure eight): figure eight knot; knot illustration (square): square knot
kubek herbaty - mug of tea: mug of tea; la prugna: plum; labrador retriever (black): black labrador dog
lam:; lampada di aladino (aladin): genie lamp; lampada_da_cantiere: work lamp; lana: wool
landscape near the river: river landscape; large basic plate: large plate; lattine di birra: beer cans
lcd: monitor; le mie tigri preferite: tigers; leafrake: leaf rake; lemon (half slice): lemon half slice
lemon (half): half lemon; lemon (slice): lemon slice; lemon (wedge): lemon wedge; lemon (whole): lemon
lens: magnifying lens; lente meno: magnifying glass; lente normale: magnifying glass; leone: lion
lettera: letter; libellula: dragonfly; libellule: dragonfly; liberty:
lightly decorated evergreen: decorated evergreen tree; lightsabers: lightsabers
lime (half slice): lime half slice; lime (half): half lime; lime (slice): lime slice
lime (wedge): lime wedge; lime (whole): lime; lime half: half lime; little boy - atomic bomb: atomic bomb
livella: spirit level; lock: padlock; lock - open: open padlock; lotion: lotion bottle
low temperature: low temperature sign; lowtec house: house; lucchetto grigio: grey padlock
lucchetto ottone: brass padlock; lucertola: lizard; lucertola arrotolata: lizard; lucertola maya: lizard
lucertolona: lizard; lucertolone: lizard; lumaca: snail; lumaca turbo: snail; m:
m abrams main battle tank: tank; macchina caffe: coffee machine
macchina fotografica digitale: digital camera; mag: magnifying glass; magelan handheld gps: handheld gps
magnetic field: magnetic field sign; magnificator: magnifying glass; magnifing glass: magnifying glass
magnolia white: white magnolia; magnolia-white: white magnolia; male:; male silhouette: man
male symbol: male symbol; man crystal: man; man driving car: man driving a car; man face: man's face
man head: man's head; man01: man; man02: man; manager: penguin with a tie; mante religieuse: praying mantis
mantide religiosa: praying mantis; martellare: hammer hitting a nail; mascot:; mattone poroton: brick
mazzo di fiori: bouquet of flowers; mcoon:; md:; meatgrinder: meat grinder; mechorse: mechanical horse
medicina dottore: vitamin bottles; menu clip art collection example:; metro_avvolgibile: tape measure
mhooo: cow; microscopio: microscope; midautumn:; minute hand:; mix cucina, frullatore: blender; mm gun: gun
mobile:; monetary euro symbol: euro symbol; moon01: moon; moon02: moon; moons: moon; moschito: mosquito
moschito stecchito: mosquito; mostriciattolo:; motosega: chainsaw; mount hood: snowy mountain
mountain - rpg map elements: mountain; mountain seal:; mouse scroll: computer mouse; mouse2: computer mouse
mouth - body part: mouth; movie:; mpcad:; mpcad box x x: cardboard box; mr:; ms:; mucca: cow
mulit colour fireworks: colorful fireworks; music theory tone semi-tone:; my house: house
my lovely baby: baby; mygraph:; navigation_display_panel:; new penguin: penguin; ninja tux: penguin ninja
ninjastar: throwing star; no: prohibition sign; no u turn sign: no u-turn road sign
nodding donkey: oil pump; nomoon openclipart:; nonno sport:; northern hemisphere globe: globe
nosmoke: no smoking sign; nuage: cloud; nucleare simbolo: radioactive sign; numero verde:
oceania: map of oceania; oh:; olifant: elephant; orange burner:; orme sulla neve: footprints in the snow
orologio da parete: wall clock; orso: bear; otto:; ours: bear; out of the box:
owl on branch: owl on a branch; pacco regalo: wrapped gift; packman: pacman; pacman (yet another): pacman
padania:; padlock unlocked silhouette: open padlock; paesaggio marino: seascape; page:; palloncini: balloons
pallone aerestatico: hot air balloon; pan cakes: pancakes; pan cakes (b and w): pancakes in black and white
pancakes_berries: pancakes with berries; pancakes_berries_bw: pancakes with berries in black and white
panel:; pannocchia di gran turco: corn cob; pansement: adhesive bandage; paper side:; paper_rpswb:
papera: duck; parchment paper landscape: parchment paper; parchment paper portrait: parchment paper
parchment paper portrait symbol: parchment paper; parking: parking sign; pasteque: watermelon
pattinatrice: ice skater; pattinatrici sul ghiaccio: ice skaters; pattino: skate; peace symbol: peace symbol
peace symbol (transparent fix): peace symbol; pecora: sheep; pecorella: sheep; penguin/tux_didier_fabert_01:
pennuto01: bird; pennuto02: bird; penny front: coin; people: group of people
peperoncino - pepper: chili pepper; pera: pear; perspectival house: house; pesca: peach; pescetto: fish
pescetto arancione: orange fish; pesistica: dumbbells; peters map: world map; pfd:
phone handset gray: gray phone handset; phone_lutte:; piano_theory_ganson1:; picture frame: picture frame
pimp hat: hat; pinguino: penguin; pinguino col piccolo: penguin with its chick; pinguino1: penguin
pinguino2: penguin; pinguino3: penguin; pinguino4: penguin; pink cake: pink cake; pinkhome: pink house
pinkhome-simple: pink house; pinkhome2: pink house; pinkhome3: pink house; pinzatrice rollandin: stapler
pinzatrice_grigia: grey stapler; pittura_con_pennello: painting with a brush; pizza stagioni: pizza
planet: planet; planet earth: planet earth; plant - rpg map elements: plant; plush tux: plush penguin
pocket trumpet b flat (b and w): pocket trumpet in black and white
pocket trumpet b flat (colour): pocket trumpet; points of sail (sailing):; police man: policeman
pollo: turkey; poltrona ufficio: office chair; pomodori: tomatoes; pop can: soda can
pop can (b and w): soda can in black and white; porcinet: piglet; port hub:; port switch:
portafoglio: wallet; ppl1: people; ppl2: people; ppl3: people; ppl4: people; ppls: people
pregnancy silhouet: pregnant woman; principessa: princess; principessa_bn: princess in black and white
probability from to:; profile: person in profile; profilo_della_citta: city skyline
proiettore: film projector; propeller: propeller hat; provetta: test tube; provette: test tubes; prune: plum
pseudo globe: globe; psycho icecube: ice cube with a face; puffin-md: puffin; punaisa: bug
puntine: pushpins; quattro farfalle: four butterflies; quaver: musical note; quay sign: quay sign; question:
quit:; raccoon opening box: raccoon opening a box; racked:; radio/wireless tower: radio tower
ragazza_bionda: blond girl; ragazza_bruna: brown-haired girl; ragazza_rossa: red-haired girl
ragazza_seduta: sitting girl; ragazzo: boy; ragnetto incazzato: angry spider; ragno figo:; rain: rain cloud
ralf@ark.in-berlin.de: penguin; ramarro: green lizard; rana: frog; ravanello: radish; reaching (sailing):
recycle: recycling symbol; recycle water:; recycling symbol: recycling symbol; recznik - wiper:
redcar: red car; reunion: meeting; rhythmbox:; rich young man, counting: man counting money
rich young man, going away sad: sad man walking away; road runner:; roadsigns/airplane: airplane road sign
roadsigns/bambi: deer crossing road sign; roadsigns/bus_lane: bus lane road sign
roadsigns/cattle: cattle crossing road sign; roadsigns/crossroads: crossroads road sign
roadsigns/crosswind: crosswind road sign; roadsigns/curve_ahead: curve road sign
roadsigns/cycle_lane: bicycle road sign; roadsigns/cycle_route: cycle route road sign
roadsigns/cycles: bicycle road sign; roadsigns/drawbridge: drawbridge road sign
roadsigns/falling_rocks: falling rocks road sign; roadsigns/give_way: give way road sign
roadsigns/horse: horse road sign; roadsigns/keep_left: keep left road sign
roadsigns/lorry_length: truck road sign; roadsigns/lorry_limit: truck road sign
roadsigns/man_w_umbrella: road works sign; roadsigns/motorway_on: motorway road sign
roadsigns/narrows: road narrows sign; roadsigns/narrows_both: road narrows sign
roadsigns/no_buses: no buses road sign; roadsigns/no_cycles: no cycling road sign
roadsigns/no_entry: no entry road sign; roadsigns/old_folks: elderly people crossing road sign
roadsigns/oneway: one way road sign; roadsigns/pass_either: arrows road sign
roadsigns/rail_fence: railroad crossing sign; roadsigns/roundabout: roundabout road sign
roadsigns/slippery: slippery road sign; roadsigns/stop: stop sign; roadsigns/train: train crossing road sign
roadsigns/tram: tram road sign; roadsigns/trams_only: tram road sign; roadsigns/tunnel: tunnel road sign
roadsigns/turn_ahead: turn road sign; roadsigns/turn_left: turn left road sign
roadsigns/two_way_ahead: two-way traffic road sign; rock_rpswb:
rollerblading beginner: person rollerblading; roman:; rondelle d'orange: orange slice
rondelle orange: orange slice; rosa1: rose; rosa2: rose; rose: rose; roundpointshovel: shovel; route:
rpm record: vinyl record; rpm records: vinyl records; rubber duck family swimming: rubber ducks
rubik: rubik's cube; running free (sailing):; ruota dentata: gear wheel
ruota dentata grigia: grey gear wheel; sacco a pelo per campeggio: sleeping bag
sailboat illustration with label points:; sailing_sunset: two sailboats at sunset; saint:; saku robot: robot
samoa tatoo pattern:; sandwich one: sandwich; sandwich one bw: sandwich in black and white
sapin: evergreen tree; sapone liquido: liquid soap; saxowoman:; scala_doppia: stepladder
scatolone: cardboard box; school (country): country school; school in fall: school in autumn
scissors_rpswb:; scodella gatto: cat bowl; scolapasta e pentola: colander and pot
scorpion-md-v0.1: scorpion; scotch rollandin francesco: adhesive tape; secchio e spugna: bucket and sponge
security marking:; sedia e ombrelloni: chair with umbrella; sedia in legno: wooden chair
sega_per_legno: wood saw; segmented:; self portrait:; serratura01: lock; serratura02: lock; set_gatti:
sexy lady:; shaezy: sheep; shamrock for march: shamrock; sheep-md-v0.1: sheep
shelby cobra blueprint: car blueprint; shelby cobra car blueprint: car blueprint
signore: man with a headset; signorina: woman with a headset; signorina_in_viola: woman in purple
signorinacappello: woman with a hat; signorinafoulard: woman with a scarf; silouettedonnavestiti:; silvia:
simple croche: musical note; simple crown with one riser: crown; simple crown with three risers: crown
simple evergreen, with highlights: evergreen tree; siringa: syringe; skoda car: car; skoynk: rabbit
skull-and-bones-aj: skull and crossbones; slalom water skier: water skier; slate-apple: slate with an apple
slim cell phone: cell phone; small basic plate: small plate; smiley: smiley face
smiley_nicolas: smiley face; smiley_nicolas_gagliani: smiley face; smileytwinkle: smiley face
smoke: smoking cigar; snow: snow cloud; snowstorm: snow cloud; soccer ballon: soccer ball; sole: sun
sony clie: handheld computer; south australia:; soviet shuttle: space shuttle; spaclu: putty knife
spaghetti and sauce: spaghetti with sauce
spaghetti and sauce (b and w): spaghetti with sauce in black and white; spaventapasseri: scarecrow; splash:
sport:; sport_aerobica:; sport_garudasana: yoga pose; sport_harnsasana: yoga pose
sport_khagarnasana: yoga pose; sport_kzounchasana: yoga pose; sport_mayuzasana: yoga pose
sport_paksinasana: yoga pose; sport_parsva_bakasana: yoga pose; sport_stacco01:; sport_stacco02:
sportcar: sports car; sprint cell phone: cell phone; squeek: pig; stambecco valdostano: ibex
stappler: stapler; stara ksiega - old book: old book; steak-v0.1: steak; stefan graubner:
stetoscopio_fonendoscopio: stethoscope; stick man: stick figure; stickyman: stick figure; stones: stones
stop sign, right font: stop sign; stop-sign-angled: stop sign; storm: storm cloud
stormo di uccelli: flock of birds; straw tote: straw bag; stripper:; striscia_agnellini: row of lambs
striscia_mucche: row of cows; struzzo: ostrich; stylized teddy bear with heart: teddy bear with a heart
stylized yoga person: person doing yoga; sub subacqueo: scuba diver; submarine sandwich: submarine sandwich
sun flower: sunflower; sun01: sun; sun02: sun; sung - chinese taichi meaning flowing, relaxed:
sunshine: sun; svg_globe: globe; svg_globe_blue: blue globe; svg_globe_green: green globe; sweden:
symbol for a church on a map: church symbol; symbolic boy: boy; tabella: calendar; tacchino: turkey
tacchino_di_natale: roast turkey; tack diagram (sailing):; tacks (sailing):
tante orme sulla neve: paw prints; tavola_esame_ottico: eye chart; tavolo in legno: wooden table
tavolozza: paint palette; tazza di caffe: cup of coffee; teacup_ganson: teacup; team sketch: team of people
teddybear: teddy bear; teide:; teiera tazza: teapot and cup; telecamera: video camera; telefono: phone
telefono (email: frollandin@email.it):; televisore telecomando: television and remote control
tenda da campeggio: tent; tennis shoe: tennis shoe; teschio: skull; texturelegno:
thanksgiving spread: thanksgiving dinner; the electronic mail:; the incredible tux:
the mad little ship: ship; thongs: flip-flops; three colour fireworks: colorful fireworks; three eyes:
tie - clothing: tie; tigre: tiger; tile orange:; time: hourglass; tool:; tophat: top hat; topo: mouse
toro al tramonto: bull at sunset; torta: cake; tower: computer tower; toyota land cruiser: off-road car
tpt_cubf_ganson: trumpet; tramezzino: sandwich; traslocatore01: mover carrying a box
traslocatore02: mover carrying a box; traslocatore03: mover carrying a box; trattore: tractor
tree - rpg map elements: tree; tree branches and roots: tree with roots; tree whit fruits: tree with fruits
trekking_in_montagna: hiker in the mountains; triangle:; trip to the beach: car trip to the beach
trumpet b flat (b and w): trumpet in black and white; trumpet b flat (colour): trumpet
trumpet harmon mute: trumpet mute; trumpet straight mute: trumpet mute
trumpet stylized symbol: trumpet; tulips in bloom: tulips in bloom; turkey on platter: turkey on a platter
turkey platter with fruit and vegitables: turkey platter with fruit and vegetables; tux: penguin
tux head: penguin head; tv: television; two sailboats in sunset: two sailboats at sunset
uccello bianco e nero: bird; unsorted/angel_01:; unsorted/caterpillar: bulldozer
unsorted/pavement_frouke_01:; uovo_sorridente: smiling egg
us capitol building clipart style: capitol building; us capitol building inkpen style: capitol building
user: person; utensile sega: saw; utensili chiave e cacciavite: wrench and screwdriver; utente singolo:
utenti:; vacca pezzata rossa valdostana: cow; vacuum cleaner: vacuum cleaner; valigie bags: suitcases
van gogh 's room: bedroom painting; van gogh 's sun flower: sunflowers in a vase; various servers: servers
various_servers: servers; vavuum cleaner - upright: vacuum cleaner; vestito_rosa: pink dress; video:
video lcd:; video1_sergio_luiz_arauj:; video_lcd:; virus:; viti: screws; vtt: mountain bike; w_cloud: cloud
wall: brick wall; wall1: brick wall; water balloon throw: child throwing a water balloon
water balloon throw and hit: children throwing a water balloon; wc: toilet sign; wd:
wet paint sign: wet paint sign; what have you done:; what's:; what's up, doc: carrot; what_have_you_done:
wheelchair symbol: wheelchair symbol; wild summer shorts: colorful shorts; wing:; wire globe: wire globe
woman police: policewoman; woman01: woman; woman02: woman; wooden mallot: wooden mallet; xbill:; xmas:
yoga: person doing yoga; zaino_per_montagna: hiking backpack; zanzara: mosquito; zanzara cretina: mosquito
zielony kubek herbaty - green mug of tea: green mug of tea; zinf:; zucca: pumpkin
"""

# By `folder/file`, file name or title (lower-case, titles without digits); an empty one drops the picture.
CAPTIONS: dict[str, str] = {
    key.strip(): caption.strip()
    for line in _TABLE.strip().splitlines()
    for key, _, caption in (entry.rpartition(":") for entry in re.split(r"; ?(?=\S)", line))
}
