package org.mobilemm

import java.util.PriorityQueue

/**
 * A tokenizer's model: characters joined pair by pair, the pair that training joined first before the others.
 *
 * Source: Sennrich et al. 2016, arXiv 1508.07909, section 3.2; bytes in place of unknown characters as SentencePiece
 * has them.
 */
internal class BytePairEncoding private constructor(
    private val ids: Map<String, Int>,
    private val merges: Map<Long, Merge>,
    private val unknown: Int?,
    private val byteFallback: Boolean,
    private val fuseUnknown: Boolean,
    private val ignoreMerges: Boolean,
) {
    val tokens: Map<Int, String> = ids.entries.associate { (text, id) -> id to text }
    private val cache = HashMap<String, IntArray>()

    class Merge(val rank: Int, val id: Int)

    /** Adds the ids of one word, as the pre-tokenizer gives it. */
    fun encode(
        word: String,
        into: MutableList<Int>,
    ) {
        if (word.isEmpty()) return
        var found = cache[word]
        if (found == null) {
            val whole = if (ignoreMerges) ids[word] else null
            found = if (whole != null) intArrayOf(whole) else merged(symbols(word))
            if (word.length <= CACHED_LENGTH) {
                if (cache.size >= CACHED_WORDS) cache.clear()
                cache[word] = found
            }
        }
        for (id in found) into += id
    }

    /** Each character's id; of an unknown one its bytes' or the unknown token's, where the model has them. */
    private fun symbols(word: String): IntArray {
        val found = ArrayList<Int>(word.length)
        var lastUnknown = false
        var at = 0
        while (at < word.length) {
            val length = Character.charCount(word.codePointAt(at))
            val text = word.substring(at, at + length)
            at += length
            val id = ids[text]
            if (id != null) {
                found += id
                lastUnknown = false
                continue
            }
            val bytes = if (byteFallback) text.toByteArray().map { ids[byteToken(it)] } else listOf(null)
            if (bytes.none { it == null }) {
                found += bytes.filterNotNull()
                lastUnknown = false
            } else if (unknown != null && !(fuseUnknown && lastUnknown)) {
                found += unknown
                lastUnknown = true
            }
        }
        return found.toIntArray()
    }

    private class Candidate(val rank: Int, val left: Int, val right: Int, val id: Int, val first: Int, val second: Int)

    private fun merged(symbols: IntArray): IntArray {
        val count = symbols.size
        if (count < 2) return symbols
        val next = IntArray(count) { if (it + 1 < count) it + 1 else -1 }
        val previous = IntArray(count) { it - 1 }
        val queue = PriorityQueue<Candidate>(compareBy<Candidate> { it.rank }.thenBy { it.left })

        fun consider(
            left: Int,
            right: Int,
        ) {
            if (left < 0 || right < 0) return
            val merge = merges[pair(symbols[left], symbols[right])] ?: return
            queue += Candidate(merge.rank, left, right, merge.id, symbols[left], symbols[right])
        }
        for (index in 0 until count - 1) consider(index, index + 1)
        while (true) {
            val best = queue.poll() ?: break
            // One of the two may have been joined with another meanwhile.
            val stale = symbols[best.left] != best.first || next[best.left] != best.right || symbols[best.right] != best.second
            if (stale) continue
            symbols[best.left] = best.id
            symbols[best.right] = GONE
            next[best.left] = next[best.right]
            if (next[best.right] >= 0) previous[next[best.right]] = best.left
            consider(previous[best.left], best.left)
            consider(best.left, next[best.left])
        }
        return symbols.filter { it != GONE }.toIntArray()
    }

    companion object {
        private const val CACHED_WORDS = 10_000
        private const val CACHED_LENGTH = 64
        private const val GONE = -1

        fun byteToken(byte: Byte) = "<0x%02X>".format(byte.toInt() and 0xff)

        private fun pair(
            left: Int,
            right: Int,
        ) = left.toLong() shl 32 or right.toLong()

        fun read(of: Map<String, Any?>): BytePairEncoding {
            // Old files leave the type out.
            if ((of["type"] ?: "BPE") != "BPE") unknown("model", of)
            if (of["dropout"] != null && of["dropout"] != 0.0) throw UnknownTokenizer("'dropout' gives other ids each time")
            for (key in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
                if (!(of[key] as? String).isNullOrEmpty()) throw UnknownTokenizer("'$key' is not known here")
            }
            val ids =
                of.at("vocab").mapValues { (_, id) ->
                    (id as? Long)?.takeIf { it in 0 until Int.MAX_VALUE }?.toInt()
                        ?: throw UnknownTokenizer("'vocab' maps to ${shown(id)}")
                }
            val merges = HashMap<Long, Merge>()
            (of["merges"] as? List<*> ?: throw UnknownTokenizer("'merges' is missing")).forEachIndexed { rank, merge ->
                val (left, right) = parts(merge)
                val joined = ids[left + right]
                val one = ids[left]
                val two = ids[right]
                if (joined == null || one == null || two == null) {
                    throw UnknownTokenizer("merge $rank (${shown(left)}, ${shown(right)}) is not in the vocabulary")
                }
                merges[pair(one, two)] = Merge(rank, joined)
            }
            val unknown =
                (of["unk_token"] as? String)?.let { ids[it] ?: throw UnknownTokenizer("'unk_token' is not in the vocabulary") }
            return BytePairEncoding(
                ids,
                merges,
                unknown,
                of.flag("byte_fallback"),
                of.flag("fuse_unk"),
                of.flag("ignore_merges"),
            )
        }

        /** Old files have "a b", new ones ["a", "b"]. */
        private fun parts(merge: Any?): Pair<String, String> {
            if (merge is List<*> && merge.size == 2 && merge.all { it is String }) {
                return merge[0] as String to merge[1] as String
            }
            val words = (merge as? String)?.split(' ')
            if (words?.size != 2) throw UnknownTokenizer("a merge is ${shown(merge)}")
            return words[0] to words[1]
        }
    }
}
