import os, sys
sys.path.insert(0,'tools')
import gpu_check as g, torch
from pathlib import Path
layout=g._layout(); k=g.Kernels(torch,Path('/tmp/lib.so'),'cuda')
big=torch.empty(1<<29,dtype=torch.uint8,device='cuda')
D=2048
for bits,group,n_in,n_out,sp,w in ((4,128,8192,2048,16,16),(4,128,2048,65536,2,4),(4,32,2048,2048,16,16),(8,32,8192,2048,16,16)):
    padded=layout.padded_inputs(n_in)
    W=torch.randint(0,256,(n_out,padded*bits//8),device='cuda',dtype=torch.uint8); SC=torch.rand(n_out,padded//group,device='cuda').half()
    x=torch.randn(1,n_in,device='cuda').half(); y=torch.empty(1,n_out,device='cuda').half()
    os.environ['TUNE_WARPS']=str(w); os.environ['TUNE_SPLIT']=str(sp)
    for _ in range(2):
        big.fill_(1); k.product(1,bits,group,n_out,x,W,SC,y)
    torch.cuda.synchronize()
