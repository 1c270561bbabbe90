package org.mobilemm

import java.text.Normalizer
import java.util.regex.Pattern
import java.util.regex.PatternSyntaxException

/** A text made ready for the cuts; it may change characters, and put some in front. */
internal fun normalizer(value: Any?): (String) -> String {
    val of = component(value) ?: return { it }
    return when (of["type"]) {
        "Sequence" -> {
            val each = of.all("normalizers").map(::normalizer)
            return { text -> each.fold(text) { now, normalize -> normalize(now) } }
        }
        "Prepend" -> of.text("prepend").let { prefix -> { text -> if (text.isEmpty()) text else prefix + text } }
        "Replace" -> replacement(of)
        "NFC" -> { text -> Normalizer.normalize(text, Normalizer.Form.NFC) }
        "NFD" -> { text -> Normalizer.normalize(text, Normalizer.Form.NFD) }
        "NFKC" -> { text -> Normalizer.normalize(text, Normalizer.Form.NFKC) }
        "NFKD" -> { text -> Normalizer.normalize(text, Normalizer.Form.NFKD) }
        else -> unknown("normalizer", of)
    }
}

internal fun replacement(of: Map<String, Any?>): (String) -> String {
    val pattern = of.at("pattern")
    val content = of.text("content")
    (pattern["String"] as? String)?.let { literal -> return { it.replace(literal, content) } }
    // What SentencePiece's models do to a space that a text begins with.
    if (pattern["Regex"] == "\\A ") return { if (it.startsWith(' ')) content + it.substring(1) else it }
    throw UnknownTokenizer("'Replace' by the regular expression ${shown(pattern["Regex"])} is not known here")
}

/** A text cut into the words that the model joins within; `first` when nothing of the whole text stands before it. */
internal fun preTokenizer(value: Any?): (text: String, first: Boolean) -> List<String> {
    val of = component(value) ?: return { text, _ -> listOf(text) }
    return when (of["type"]) {
        "Sequence" -> {
            val each = of.all("pretokenizers").map(::preTokenizer)
            return { text, first ->
                each.fold(listOf(text)) { words, cut -> words.flatMapIndexed { index, word -> cut(word, first && index == 0) } }
            }
        }
        "ByteLevel" -> byteLevel(of)
        "Digits" -> digits(of.flag("individual_digits"))
        "Split" -> split(of)
        "Metaspace" -> metaspace(of)
        else -> unknown("pre-tokenizer", of)
    }
}

/** GPT-2's words: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.2. */
private const val BYTE_LEVEL = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

private fun byteLevel(of: Map<String, Any?>): (String, Boolean) -> List<String> {
    val prefix = of.flag("add_prefix_space", true)
    val cut = if (of.flag("use_regex", true)) ClassedPattern(BYTE_LEVEL) else null
    return { given, _ ->
        val text = if (prefix && !given.startsWith(' ')) " $given" else given
        val words = cut?.pieces(text)?.map { it.text } ?: listOf(text)
        words.map(ByteLevel::encode)
    }
}

private fun digits(individual: Boolean): (String, Boolean) -> List<String> =
    { text, _ ->
        val words = ArrayList<String>()
        var start = 0
        var at = 0
        var inDigits = false
        while (at < text.length) {
            val point = text.codePointAt(at)
            val isDigit = CharacterClasses.isDigit(point)
            if (at > start && (isDigit != inDigits || (isDigit && individual))) {
                words += text.substring(start, at)
                start = at
            }
            inDigits = isDigit
            at += Character.charCount(point)
        }
        if (start < text.length) words += text.substring(start)
        words
    }

private fun split(of: Map<String, Any?>): (String, Boolean) -> List<String> {
    val pattern = of.at("pattern")
    val regex = pattern["Regex"] as? String
    val string = pattern["String"] as? String
    val cut =
        when {
            regex != null -> ClassedPattern(regex)::pieces
            string != null -> { text: String -> literalPieces(text, string) }
            else -> throw UnknownTokenizer("'Split' has no pattern")
        }
    val behavior = of.text("behavior")
    val invert = of.flag("invert")
    if (behavior !in setOf("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")) {
        throw UnknownTokenizer("'Split' with the behavior ${shown(behavior)} is not known here")
    }
    return { text, _ -> arrange(cut(text).map { Cut(it.text, it.matched != invert) }, behavior) }
}

private fun metaspace(of: Map<String, Any?>): (String, Boolean) -> List<String> {
    val mark = of.text("replacement")
    val prepend = of["prepend_scheme"] as? String ?: if (of.flag("add_prefix_space", true)) "always" else "never"
    val isCut = of.flag("split", true)
    return { given, first ->
        var text = given.replace(" ", mark)
        if (!text.startsWith(mark) && (prepend == "always" || (prepend == "first" && first))) text = mark + text
        if (isCut) arrange(literalPieces(text, mark), "MergedWithNext") else listOf(text)
    }
}

/** A piece of a text, and whether the pattern matched it or it stands between matches. */
internal class Cut(val text: String, val matched: Boolean)

private fun literalPieces(
    text: String,
    string: String,
): List<Cut> {
    val pieces = ArrayList<Cut>()
    var done = 0
    while (string.isNotEmpty()) {
        val found = text.indexOf(string, done)
        if (found < 0) break
        if (found > done) pieces += Cut(text.substring(done, found), false)
        pieces += Cut(string, true)
        done = found + string.length
    }
    if (done < text.length) pieces += Cut(text.substring(done), false)
    return pieces
}

private fun arrange(
    cuts: List<Cut>,
    behavior: String,
): List<String> {
    val words = ArrayList<String>()
    when (behavior) {
        "Removed" -> cuts.filter { !it.matched }.mapTo(words) { it.text }
        "Isolated" -> cuts.mapTo(words) { it.text }
        "Contiguous" -> {
            var last: Boolean? = null
            for (cut in cuts) {
                if (cut.matched == last) words[words.lastIndex] += cut.text else words += cut.text
                last = cut.matched
            }
        }
        "MergedWithPrevious" -> {
            var lastMatched = false
            for (cut in cuts) {
                if (cut.matched && !lastMatched && words.isNotEmpty()) words[words.lastIndex] += cut.text else words += cut.text
                lastMatched = cut.matched
            }
        }
        "MergedWithNext" -> {
            var lastMatched = false
            for (cut in cuts.asReversed()) {
                if (cut.matched && !lastMatched && words.isNotEmpty()) {
                    words[words.lastIndex] = cut.text + words.last()
                } else {
                    words += cut.text
                }
                lastMatched = cut.matched
            }
            words.reverse()
        }
    }
    return words.filter { it.isNotEmpty() }
}

/**
 * A tokenizer's regular expression, whose `\s`, `\p{L}` and `\p{N}` mean the same on every Android version.
 *
 * The text is matched through a copy of it, in which each character beyond ASCII is replaced by one that stands for
 * its class and that every version classes alike. That is the same as long as the expression names no others.
 */
internal class ClassedPattern(expression: String) {
    private val pattern: Pattern

    init {
        val classes = Regex("\\\\[pP]\\{(\\^?[^}]*)}").findAll(expression).map { it.groupValues[1] }.toSet()
        val others = classes - setOf("L", "N")
        if (others.isNotEmpty() || expression.any { it.code >= 128 } || Regex("\\\\[wWdDbBxuXhHR]|\\[\\[|&&").containsMatchIn(expression)) {
            throw UnknownTokenizer("the regular expression ${shown(expression)} is not known here")
        }
        pattern =
            try {
                Pattern.compile(expression)
            } catch (error: PatternSyntaxException) {
                throw UnknownTokenizer("the regular expression ${shown(expression)} is not valid")
            }
    }

    fun pieces(text: String): List<Cut> {
        val places = IntArray(text.length + 1)
        val classed = StringBuilder(text.length)
        var at = 0
        while (at < text.length) {
            val point = text.codePointAt(at)
            places[classed.length] = at
            classed.append(representative(point))
            at += Character.charCount(point)
        }
        places[classed.length] = text.length
        val pieces = ArrayList<Cut>()
        var done = 0

        fun add(
            start: Int,
            end: Int,
            matched: Boolean,
        ) {
            if (end > start) pieces += Cut(text.substring(places[start], places[end]), matched)
        }
        val matcher = pattern.matcher(classed)
        while (matcher.find()) {
            add(done, matcher.start(), false)
            add(matcher.start(), matcher.end(), true)
            done = matcher.end()
        }
        add(done, classed.length, false)
        return pieces
    }

    private fun representative(point: Int): Char =
        when {
            point < 128 -> point.toChar()
            CharacterClasses.isLetter(point) -> 'ª'
            CharacterClasses.isNumber(point) -> '²'
            CharacterClasses.isSpace(point) -> '\u000B'
            else -> '§'
        }
}

/** Bytes as printable characters, so that a vocabulary of texts can hold any of them. */
internal object ByteLevel {
    private val chars = CharArray(256)
    private val bytes = HashMap<Char, Byte>()

    init {
        var other = 256
        for (byte in 0..255) {
            val printable = byte in 0x21..0x7e || byte in 0xa1..0xac || byte in 0xae..0xff
            chars[byte] = if (printable) byte.toChar() else (other++).toChar()
            bytes[chars[byte]] = byte.toByte()
        }
    }

    fun encode(word: String): String {
        val utf8 = word.toByteArray()
        return String(CharArray(utf8.size) { chars[utf8[it].toInt() and 0xff] })
    }

    /** The text of tokens; one that holds other characters stands for itself, as added tokens do. */
    fun decode(words: List<String>): String {
        val out = java.io.ByteArrayOutputStream()
        for (word in words) {
            val decoded = ByteArray(word.length)
            val whole = word.indices.all { index -> bytes[word[index]]?.also { decoded[index] = it } != null }
            out.write(if (whole) decoded else word.toByteArray())
        }
        return Utf8.lossy(out.toByteArray())
    }
}
