package org.mobilemm

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.channels.FileChannel

/**
 * Whether an ONNX part refers to its own files alone, and inside of them: looked at without a runtime.
 *
 * Source: onnx.proto3 (ModelProto, GraphProto, TensorProto, "external_data") and protobuf's wire format.
 */
internal object OnnxCheck {
    private const val LARGEST_GRAPH = 512L shl 20

    // The fields that lead to tensors.
    private const val MODEL_GRAPH = 7
    private const val MODEL_FUNCTIONS = 25
    private const val GRAPH_NODE = 1
    private const val GRAPH_INITIALIZER = 5
    private const val GRAPH_SPARSE = 15
    private const val NODE_ATTRIBUTE = 5
    private const val FUNCTION_NODE = 7
    private const val ATTRIBUTE_TENSOR = 5
    private const val ATTRIBUTE_GRAPH = 6
    private const val ATTRIBUTE_TENSORS = 10
    private const val ATTRIBUTE_GRAPHS = 11
    private const val TENSOR_EXTERNAL = 13

    /** Raises [MobileMMError] naming the part's file. */
    fun check(
        folder: File,
        manifest: Manifest,
        name: String,
    ) {
        val part = manifest.parts.getValue(name)
        val file = File(folder, part.file)
        if (file.length() > LARGEST_GRAPH) refuse(file, "its graph is larger than ${LARGEST_GRAPH shr 20} MB")
        val sizes = manifest.files.associate { it.path to it.bytes }
        val beside = part.file.substringBeforeLast('/', "")
        val data = part.files.filter { it != part.file && it.substringBeforeLast('/', "") == beside }
        val known = data.associate { it.substringAfterLast('/') to sizes.getValue(it) }
        RandomAccessFile(file, "r").use { opened ->
            val bytes = opened.channel.map(FileChannel.MapMode.READ_ONLY, 0, file.length())
            try {
                walk(Wire(bytes), Kind.MODEL, 0) { key -> external(file, known, key) }
            } catch (error: RuntimeException) {
                refuse(file, "is not an ONNX file, or damaged")
            }
        }
    }

    private enum class Kind { MODEL, GRAPH, NODE, FUNCTION, ATTRIBUTE, TENSOR, SPARSE_TENSOR }

    private fun inner(
        kind: Kind,
        field: Int,
    ): Kind? =
        when (kind) {
            Kind.MODEL -> mapOf(MODEL_GRAPH to Kind.GRAPH, MODEL_FUNCTIONS to Kind.FUNCTION)
            Kind.GRAPH -> mapOf(GRAPH_NODE to Kind.NODE, GRAPH_INITIALIZER to Kind.TENSOR, GRAPH_SPARSE to Kind.SPARSE_TENSOR)
            Kind.NODE -> mapOf(NODE_ATTRIBUTE to Kind.ATTRIBUTE)
            Kind.FUNCTION -> mapOf(FUNCTION_NODE to Kind.NODE)
            Kind.ATTRIBUTE ->
                mapOf(
                    ATTRIBUTE_TENSOR to Kind.TENSOR,
                    ATTRIBUTE_GRAPH to Kind.GRAPH,
                    ATTRIBUTE_TENSORS to Kind.TENSOR,
                    ATTRIBUTE_GRAPHS to Kind.GRAPH,
                )
            Kind.SPARSE_TENSOR -> mapOf(1 to Kind.TENSOR, 2 to Kind.TENSOR)
            Kind.TENSOR -> emptyMap()
        }[field]

    private fun walk(
        wire: Wire,
        kind: Kind,
        depth: Int,
        external: (Map<String, String>) -> Unit,
    ) {
        require(depth < 32)
        val entries = HashMap<String, String>()
        while (wire.more()) {
            val (field, body) = wire.next() ?: continue
            if (kind == Kind.TENSOR && field == TENSOR_EXTERNAL) {
                val (key, value) = body.keyAndValue()
                entries[key] = value
            } else {
                inner(kind, field)?.let { walk(body, it, depth + 1, external) }
            }
        }
        if (entries.isNotEmpty()) external(entries)
    }

    private fun external(
        file: File,
        known: Map<String, Long>,
        entries: Map<String, String>,
    ) {
        val location = entries["location"] ?: ""
        val size = known[location] ?: refuse(file, "a tensor's data is in ${shown(location)}, which is no file of this part")
        val offset = entries["offset"]?.let { it.toLongOrNull() ?: -1 } ?: 0
        val length = entries["length"]?.let { it.toLongOrNull() ?: -1 } ?: 0
        if (offset < 0 || length < 0 || offset > size || length > size - offset) {
            refuse(file, "a tensor's data reaches beyond the end of ${shown(location)}")
        }
    }

    private fun refuse(
        file: File,
        wrong: String,
    ): Nothing = throw Refused("$file: $wrong; ${ManifestReader.AGAIN}")

    private class Refused(message: String) : MobileMMError(message)

    /** Protobuf's fields one after the other, of which only nested ones are given. */
    private class Wire(private val bytes: ByteBuffer) {
        fun more() = bytes.hasRemaining()

        fun next(): Pair<Int, Wire>? {
            val key = varint()
            val field = (key ushr 3).toInt()
            require(field > 0)
            when ((key and 7).toInt()) {
                0 -> varint()
                1 -> bytes.position(bytes.position() + 8)
                5 -> bytes.position(bytes.position() + 4)
                2 -> {
                    val length = varint()
                    require(length in 0..bytes.remaining())
                    val body = bytes.duplicate()
                    body.limit(bytes.position() + length.toInt())
                    bytes.position(body.limit())
                    return field to Wire(body)
                }
                else -> throw IllegalArgumentException("wire type")
            }
            return null
        }

        /** Of a StringStringEntryProto. */
        fun keyAndValue(): Pair<String, String> {
            val found = arrayOf("", "")
            while (more()) {
                val (field, body) = next() ?: continue
                if (field in 1..2) found[field - 1] = body.text()
            }
            return found[0] to found[1]
        }

        private fun text() = ByteArray(bytes.remaining()).also { bytes.get(it) }.toString(Charsets.UTF_8)

        private fun varint(): Long {
            var value = 0L
            for (shift in 0..63 step 7) {
                val byte = bytes.get().toLong()
                value = value or (byte and 0x7f shl shift)
                if (byte >= 0) return value
            }
            throw IllegalArgumentException("varint")
        }
    }
}
