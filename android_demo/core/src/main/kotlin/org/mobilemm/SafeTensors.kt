package org.mobilemm

import java.io.File

/** Reads safetensors files: a header in JSON, then the numbers. Source: the format's README. */
internal object SafeTensors {
    private const val LARGEST = 256L shl 20
    private val DTYPES = mapOf("F32" to "float32", "F16" to "float16", "U8" to "uint8", "I8" to "int8", "I32" to "int32", "I64" to "int64")

    /** All tensors by name. Raises [MobileMMError] naming the file for what is no such file, or damaged. */
    fun read(file: File): Map<String, Tensor> {
        if (file.length() > LARGEST) throw MobileMMError("$file: too large for golden vectors")
        try {
            val bytes = file.readBytes()
            val length = (7 downTo 0).fold(0L) { value, index -> value shl 8 or (bytes[index].toLong() and 0xff) }
            require(length in 2..bytes.size - 8L)
            val start = 8 + length.toInt()
            val header = Json.parse(bytes.copyOfRange(8, start)) as Map<*, *>
            return header.filterKeys { it != "__metadata__" }.entries.associate { (name, value) ->
                val entry = value as Map<*, *>
                val shape = (entry["shape"] as List<*>).map { it as Long }
                val (from, to) = (entry["data_offsets"] as List<*>).map { it as Long }
                val tensor = Tensor.of(DTYPES.getValue(entry["dtype"] as String), *shape.toLongArray())
                require(from in 0..to && to <= bytes.size - start && to - from == tensor.view().limit().toLong())
                tensor.view().put(bytes, start + from.toInt(), (to - from).toInt())
                name as String to tensor
            }
        } catch (error: JsonError) {
            throw MobileMMError("$file: is no safetensors file, or damaged", error)
        } catch (error: RuntimeException) {
            throw MobileMMError("$file: is no safetensors file, or damaged", error)
        }
    }
}
