package org.mobilemm

/** The steps from tokens to text; empty where the tokenizer has none. */
internal fun decoders(value: Any?): List<(List<String>) -> List<String>> {
    val of = component(value) ?: return emptyList()
    return when (of["type"]) {
        "Sequence" -> of.all("decoders").flatMap(::decoders)
        "ByteLevel" -> listOf { words -> listOf(ByteLevel.decode(words)) }
        "Replace" -> replacement(of).let { replace -> listOf { words -> words.map(replace) } }
        "ByteFallback" -> listOf(::byteFallback)
        "Fuse" -> listOf { words -> listOf(words.joinToString("")) }
        "Strip" -> listOf(strip(of))
        "Metaspace" -> listOf(metaspace(of))
        else -> unknown("decoder", of)
    }
}

private val BYTE = Regex("<0x([0-9A-Fa-f]{2})>")

/** Runs of `<0xE4>` become characters, or one replacement character a byte where they are no UTF-8. */
private fun byteFallback(words: List<String>): List<String> {
    val found = ArrayList<String>()
    val run = java.io.ByteArrayOutputStream()

    fun end() {
        if (run.size() == 0) return
        val bytes = run.toByteArray()
        run.reset()
        if (Utf8.isValid(bytes)) found += String(bytes, Charsets.UTF_8) else repeat(bytes.size) { found += "\uFFFD" }
    }
    for (word in words) {
        val byte = BYTE.matchEntire(word)
        if (byte != null) {
            run.write(byte.groupValues[1].toInt(16))
        } else {
            end()
            found += word
        }
    }
    end()
    return found
}

private fun strip(of: Map<String, Any?>): (List<String>) -> List<String> {
    val content = of.text("content")
    if (content.length != 1) throw UnknownTokenizer("'Strip' of ${shown(content)} is not known here")
    val start = (of["start"] as? Long ?: 0).toInt()
    val stop = (of["stop"] as? Long ?: 0).toInt()
    return { words ->
        words.map { word ->
            val first = word.take(start).takeWhile { it == content[0] }.length
            val last = word.takeLast(stop).takeLastWhile { it == content[0] }.length
            if (first + last >= word.length) "" else word.substring(first, word.length - last)
        }
    }
}

private fun metaspace(of: Map<String, Any?>): (List<String>) -> List<String> {
    val mark = of.text("replacement")
    val prepends = (of["prepend_scheme"] as? String ?: if (of.flag("add_prefix_space", true)) "always" else "never") != "never"
    return { words -> words.mapIndexed { index, word -> word.replace(mark, if (index == 0 && prepends) "" else " ") } }
}

/** UTF-8 whose faults become the same number of replacement characters on every runtime. */
internal object Utf8 {
    fun isValid(bytes: ByteArray): Boolean {
        var at = 0
        while (at < bytes.size) {
            val length = sequence(bytes, at)
            if (length <= 0) return false
            at += length
        }
        return true
    }

    /**
     * One replacement character for each longest beginning of a character that breaks off, and each other byte.
     *
     * Source: the Unicode standard, section 3.9, "substitution of maximal subparts".
     */
    fun lossy(bytes: ByteArray): String {
        val text = StringBuilder()
        var start = 0
        var at = 0
        while (at < bytes.size) {
            val length = sequence(bytes, at)
            if (length > 0) {
                at += length
                continue
            }
            text.append(String(bytes, start, at - start, Charsets.UTF_8)).append('\uFFFD')
            at -= length
            start = at
        }
        return text.append(String(bytes, start, bytes.size - start, Charsets.UTF_8)).toString()
    }

    /** The length of the character that begins there; where there is none, how many bytes are wrong, negative. */
    private fun sequence(
        bytes: ByteArray,
        at: Int,
    ): Int {
        val first = bytes[at].toInt() and 0xff
        val length =
            when (first) {
                in 0x00..0x7f -> return 1
                in 0xc2..0xdf -> 2
                in 0xe0..0xef -> 3
                in 0xf0..0xf4 -> 4
                else -> return -1
            }
        for (index in 1 until length) {
            val byte = if (at + index < bytes.size) bytes[at + index].toInt() and 0xff else return -index
            val low = if (index > 1) 0x80 else mapOf(0xe0 to 0xa0, 0xf0 to 0x90)[first] ?: 0x80
            val high = if (index > 1) 0xbf else mapOf(0xed to 0x9f, 0xf4 to 0x8f)[first] ?: 0xbf
            if (byte !in low..high) return -index
        }
        return length
    }
}
