package org.mobilemm

/** Tokens that are found in a text before anything else looks at it: the longest of those that begin leftmost. */
internal class AddedTokens(private val tokens: List<AddedToken>) {
    val contents: Map<Int, String> = tokens.associate { it.id to it.content }
    val special: Set<String> = tokens.filter { it.special }.map { it.content }.toSet()

    private val raw = byFirst(tokens.filter { !it.normalized })
    private val normalized = byFirst(tokens.filter { it.normalized })

    /** A token that was found, or text between tokens; `first` when nothing stands before it. */
    class Piece(val id: Int?, val text: String, val first: Boolean)

    fun split(
        text: String,
        normalized: Boolean,
    ): List<Piece> {
        val known = if (normalized) this.normalized else raw
        if (known.isEmpty()) return if (text.isEmpty()) emptyList() else listOf(Piece(null, text, true))
        val pieces = ArrayList<Piece>()
        var done = 0
        var at = 0
        while (at < text.length) {
            val token = known[text[at]]?.firstOrNull { text.startsWith(it.content, at) }
            if (token == null) {
                at++
                continue
            }
            var start = at
            var end = at + token.content.length
            at = end
            if (token.singleWord && !(standsAlone(text, start, end))) continue
            if (token.lstrip) {
                while (start > done && isSpace(text[start - 1])) start--
            }
            if (token.rstrip) {
                while (end < text.length && isSpace(text[end])) end++
            }
            if (start > done) pieces += Piece(null, text.substring(done, start), done == 0)
            pieces += Piece(token.id, text.substring(start, end), start == 0)
            done = end
            at = maxOf(at, end)
        }
        if (done < text.length) pieces += Piece(null, text.substring(done), done == 0)
        return pieces
    }

    private fun standsAlone(
        text: String,
        start: Int,
        end: Int,
    ): Boolean {
        fun isWord(point: Int) = point == '_'.code || Character.isLetterOrDigit(point)
        return (start == 0 || !isWord(text.codePointBefore(start))) && (end == text.length || !isWord(text.codePointAt(end)))
    }

    private fun isSpace(char: Char) = CharacterClasses.isSpace(char.code)

    private fun byFirst(tokens: List<AddedToken>): Map<Char, List<AddedToken>> =
        tokens.filter { it.content.isNotEmpty() }
            .groupBy { it.content[0] }
            .mapValues { (_, same) -> same.sortedByDescending { it.content.length } }

    companion object {
        fun read(
            values: List<*>,
            leftOut: Int?,
        ): AddedTokens {
            val tokens =
                values.map { value ->
                    val of = component(value) ?: throw UnknownTokenizer("'added_tokens' holds no object")
                    AddedToken(
                        id = (of["id"] as? Long ?: throw UnknownTokenizer("an added token without 'id'")).toInt(),
                        content = of.text("content"),
                        singleWord = of.flag("single_word"),
                        lstrip = of.flag("lstrip"),
                        rstrip = of.flag("rstrip"),
                        normalized = of.flag("normalized", true),
                        special = of.flag("special"),
                    )
                }
            return AddedTokens(tokens.filter { it.id != leftOut })
        }
    }
}

internal class AddedToken(
    val id: Int,
    val content: String,
    val singleWord: Boolean,
    val lstrip: Boolean,
    val rstrip: Boolean,
    val normalized: Boolean,
    val special: Boolean,
)
