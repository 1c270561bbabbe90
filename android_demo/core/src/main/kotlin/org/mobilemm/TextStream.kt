package org.mobilemm

/**
 * Takes one token after another and gives the text that is safe to show: whole characters, and no stop string.
 *
 * New tokens are decoded behind the ones that gave the last piece, so that the pieces join to what decoding the whole
 * answer gives. What might be the beginning of a stop string is held back until it is known not to be one.
 *
 * @param decode ids → text, without special tokens.
 * @param stop strings that end the answer, themselves not part of it.
 */
class TextStream(private val decode: (List<Int>) -> String, stop: List<String> = emptyList()) {
    private val stop = stop.filter { it.isNotEmpty() }
    private val ids = ArrayList<Int>()

    // Tokens of the last piece are ids[before..sent).
    private var before = 0
    private var sent = 0
    private var held = ""

    /** Whether a stop string is complete. */
    var stopped = false
        private set

    /** The text that this token completes, often empty. */
    fun put(token: Int): String {
        if (stopped) return ""
        ids += token
        val fresh = fresh()
        // The bytes of an unfinished character decode to replacement characters.
        if (fresh.isEmpty() || fresh.endsWith(REPLACEMENT)) return ""
        before = sent
        sent = ids.size
        return release(fresh)
    }

    /** What was held back, once no more tokens come. */
    fun end(): String {
        if (stopped) return ""
        val text = release(fresh())
        before = ids.size
        sent = ids.size
        return (text + held).also { held = "" }
    }

    private fun fresh(): String {
        val known = decode(ids.subList(before, sent))
        val all = decode(ids.subList(before, ids.size))
        // By code points, as Python counts: a replacement character may have become a pair of surrogates.
        val count = known.codePointCount(0, known.length)
        return if (count >= all.codePointCount(0, all.length)) "" else all.substring(all.offsetByCodePoints(0, count))
    }

    private fun release(fresh: String): String {
        val text = held + fresh
        val end = stop.map { text.indexOf(it) }.filter { it >= 0 }.minOrNull()
        if (end != null) {
            stopped = true
            held = ""
            return text.substring(0, end)
        }
        val kept = stop.maxOfOrNull { overlap(text, it) } ?: 0
        held = text.takeLast(kept)
        return text.dropLast(kept)
    }

    private companion object {
        const val REPLACEMENT = '\uFFFD'

        /** The length of the longest end of `text` with which `string` begins. */
        fun overlap(
            text: String,
            string: String,
        ): Int = (minOf(text.length, string.length - 1) downTo 1).firstOrNull { text.endsWith(string.take(it)) } ?: 0
    }
}
