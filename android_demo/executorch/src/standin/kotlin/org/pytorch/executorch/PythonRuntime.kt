package org.pytorch.executorch

import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.File
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer
import java.util.concurrent.TimeUnit

/**
 * ExecuTorch's own runtime, in a process of Python (`tests/android/executorch_server.py`, where what is said stands).
 *
 * It lives as long as there is a program in it. `-Dmobilemm.python` names the interpreter, `-Dmobilemm.root` the folder
 * that it is started in.
 */
object PythonRuntime {
    private const val LOAD = 1
    private const val EXECUTE = 2
    private const val CLOSE = 3

    private var process: Process? = null
    private lateinit var to: DataOutputStream
    private lateinit var from: DataInputStream
    private var last = 0
    private val live = HashSet<Int>()

    /** How many programs there are. */
    val programs: Int @Synchronized get() = live.size

    @Synchronized
    internal fun load(
        path: String,
        threads: Int,
    ): Program {
        if (process == null) start()
        val id = ++last
        live += id
        try {
            to.writeByte(LOAD)
            to.writeInt(id)
            to.writeInt(threads)
            to.writeUTF(path)
            answer()
            return Program(id, List(from.readInt()) { from.readUTF() })
        } catch (error: ExecutorchRuntimeException) {
            forget(id)
            throw error
        }
    }

    internal class Program(private val id: Int, val methods: List<String>) {
        /** What a method gives lies here, and its next call writes over it. */
        private val memory = HashMap<String, ByteBuffer>()

        fun execute(
            method: String,
            inputs: List<Tensor>,
        ): Array<EValue> =
            synchronized(PythonRuntime) {
                to.writeByte(EXECUTE)
                to.writeInt(id)
                to.writeUTF(method)
                to.writeInt(inputs.size)
                for (tensor in inputs) {
                    to.writeByte(tensor.dtype().jniCode)
                    to.writeInt(tensor.shape().size)
                    tensor.shape().forEach(to::writeLong)
                    val bytes = bytes(tensor.buffer)
                    to.writeInt(bytes.size)
                    to.write(bytes)
                }
                answer()
                Array(from.readInt()) { EValue.from(read("$method $it")) }
            }

        private fun read(place: String): Tensor {
            val code = from.readByte().toInt()
            val shape = LongArray(from.readInt()) { from.readLong() }
            val bytes = ByteArray(from.readInt()).also(from::readFully)
            val known = memory[place]?.takeIf { it.capacity() == bytes.size }
            val buffer = known ?: ByteBuffer.allocateDirect(bytes.size).order(ByteOrder.nativeOrder()).also { memory[place] = it }
            buffer.clear()
            buffer.put(bytes)
            buffer.clear()
            return when (DType.entries.first { it.jniCode == code }) {
                DType.UINT8 -> Tensor.fromBlobUnsigned(buffer, shape)
                DType.INT8 -> Tensor.fromBlob(buffer, shape)
                DType.INT32 -> Tensor.fromBlob(buffer.asIntBuffer(), shape)
                DType.INT64 -> Tensor.fromBlob(buffer.asLongBuffer(), shape)
                DType.HALF -> Tensor.fromBlob(buffer.asShortBuffer(), shape)
                DType.FLOAT -> Tensor.fromBlob(buffer.asFloatBuffer(), shape)
            }
        }

        fun close() =
            synchronized(PythonRuntime) {
                if (process != null) {
                    to.writeByte(CLOSE)
                    to.writeInt(id)
                    answer()
                }
                forget(id)
            }
    }

    private fun start() {
        val words = listOf(System.getProperty("mobilemm.python") ?: error("-Dmobilemm.python=FILE is missing"), "-m", "tests.android.executorch_server")
        val root = File(System.getProperty("mobilemm.root") ?: error("-Dmobilemm.root=FOLDER is missing"))
        val made = ProcessBuilder(words).directory(root).redirectError(ProcessBuilder.Redirect.INHERIT).start()
        process = made
        to = DataOutputStream(made.outputStream.buffered())
        from = DataInputStream(made.inputStream.buffered())
    }

    /** Waits for the answer, whose content the caller reads. */
    private fun answer() {
        to.flush()
        if (from.readByte().toInt() == 0) return
        throw ExecutorchRuntimeException(from.readInt(), from.readUTF())
    }

    private fun forget(id: Int) {
        live -= id
        if (live.isNotEmpty()) return
        to.close()
        check(process!!.waitFor(20, TimeUnit.SECONDS)) { "the process of Python does not end" }
        process = null
    }

    private fun bytes(buffer: Buffer): ByteArray {
        fun filled(
            width: Int,
            put: (ByteBuffer) -> Unit,
        ) = ByteBuffer.allocate(width * buffer.capacity()).order(ByteOrder.nativeOrder()).also(put).array()
        return when (buffer) {
            is ByteBuffer -> filled(1) { it.put(buffer.duplicate().also { one -> one.clear() }) }
            is ShortBuffer -> filled(2) { it.asShortBuffer().put(buffer.duplicate().also { one -> one.clear() }) }
            is IntBuffer -> filled(4) { it.asIntBuffer().put(buffer.duplicate().also { one -> one.clear() }) }
            is LongBuffer -> filled(8) { it.asLongBuffer().put(buffer.duplicate().also { one -> one.clear() }) }
            is FloatBuffer -> filled(4) { it.asFloatBuffer().put(buffer.duplicate().also { one -> one.clear() }) }
            else -> error("a ${buffer.javaClass}")
        }
    }
}

/** A tensor whose numbers lie in a buffer. */
internal class BufferTensor(override val buffer: Buffer, shape: LongArray, private val type: DType) : Tensor(shape) {
    override fun dtype() = type

    override fun copyDataInto(dst: FloatBuffer) {
        if (buffer !is FloatBuffer) return super.copyDataInto(dst)
        buffer.rewind()
        dst.put(buffer)
    }
}
